"""What the check of the plan tells of rows and adapters beside what would stop a stage at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf import plan
from tests.plan.test_plan import STAGES, change, pair, root, said, write

__all__ = ["root"]  # the fixture


def test_what_nothing_reads_of_rows_is_named(root: Path) -> None:
    write(root / "data/raw/pairs.jsonl", [pair(number) | {"weight": 0} for number in range(300)])
    assert dict(plan.check(root, change(root), STAGES).seen)["source mine"] == "300 rows; not read: 'weight' (300)"


def test_the_reason_of_the_first_bad_row_is_told_whole(root: Path) -> None:
    write(root / "data/raw/pairs.jsonl", [pair(number) | {"chosen": number} for number in range(300)])
    (what,) = said(plan.check(root, change(root), STAGES))
    assert "the first of these malformed: " in what
    assert "'chosen'" in what


@pytest.mark.parametrize("key", ["sft__lora", "ppo__critic_lora"])
def test_adapters_for_layers_that_the_model_has_not_are_refused(root: Path, key: str) -> None:
    lora: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "foo_proj"], "learning_rate": 1e-4}
    found = plan.check(root, change(root, **{key: lora}), STAGES)
    dotted = key.replace("__", ".")
    assert said(found) == [f"{dotted}.targets: base.model 'given' has no layer named foo_proj"]
    assert "v_proj" in found.problems[0].remedy
    assert said(plan.check(root, change(root, **{key: lora | {"targets": ["q_proj", "mlp.down_proj"]}}), STAGES)) == []


@pytest.mark.parametrize("path", ["mine/pairs.jsonl", "data/raw/../pairs.jsonl", "data/prepared/pairs.jsonl"])
def test_data_that_dvc_does_not_see_are_refused(root: Path, path: str) -> None:
    write(root / path, [pair(number) for number in range(300)])
    found = plan.check(root, change(root, data__sources__0__path=path), STAGES)
    assert said(found) == [f"data.sources.0.path: {path} is not under data/raw, and the runs would not see that it changes"]
    assert f"rlhf use params.yaml data.sources.0.path={path}" in found.problems[0].remedy


def test_a_revision_of_a_folder_is_told(root: Path) -> None:
    found = plan.check(root, change(root, base__revision="main"), STAGES)
    assert (said(found), found.notes) == ([], ["base.revision: main is not read, as base.model 'given' is a folder: set it to null"])
