"""What the check of the plan tells of rows and adapters beside what would stop a stage at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from rlhf import plan
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.models.policy import build_policy
from rlhf.plan import adapters, rows
from rlhf.stages.prepare import main
from tests.plan.test_plan import PROJECT, STAGES, change, pair, root, said, write
from tests.stage_runs import tiny_params

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
    assert said(found) == [f"{dotted}.targets: base.model 'given' has no linear layer named foo_proj"]
    assert "v_proj" in found.problems[0].remedy
    assert said(plan.check(root, change(root, **{key: lora | {"targets": ["q_proj", "mlp.down_proj"]}}), STAGES)) == []


def test_adapters_for_layers_that_the_built_model_will_not_have_are_refused(root: Path) -> None:
    lora: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "embed_tokens", "query_key_value"], "learning_rate": 1e-4}
    found = plan.check(root, change(root, base=tiny_params()["base"], ppo__actor_lora=lora), STAGES)
    assert said(found) == ["ppo.actor_lora.targets: the model that base builds has no linear layer named embed_tokens, query_key_value"]
    assert found.problems[0].remedy.startswith("names of this model: down_proj, gate_proj, ")


def test_the_layers_of_the_built_model_are_known(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base = change(root, base=tiny_params()["base"]).base
    assert base.source == "build"
    modules = build_policy(base, tokenizer, 0).named_modules()
    assert adapters.of_built(base) == {name for name, module in modules if isinstance(module, torch.nn.Linear)} - {"lm_head"}


@pytest.mark.parametrize("path", ["mine/pairs.jsonl", "data/raw/../pairs.jsonl", "data/prepared/pairs.jsonl"])
def test_data_that_dvc_does_not_see_are_refused(root: Path, path: str) -> None:
    write(root / path, [pair(number) for number in range(300)])
    found = plan.check(root, change(root, data__sources__0__path=path), STAGES)
    assert said(found) == [f"data.sources.0.path: {path} is not under data/raw, and the runs would not see that it changes"]
    assert f"rlhf use params.yaml data.sources.0.path={path}" in found.problems[0].remedy


def test_a_revision_of_a_folder_is_told(root: Path) -> None:
    found = plan.check(root, change(root, base__revision="main"), STAGES)
    assert (said(found), found.notes) == ([], ["base.revision: main is not read, as base.model 'given' is a folder: set it to null"])


def test_rows_in_another_encoding_are_told_with_a_remedy(root: Path) -> None:
    text = "".join(json.dumps(pair(number) | {"prompt": f"Grüße {number}"}, ensure_ascii=False) + "\n" for number in range(300))
    (root / "data/raw/pairs.jsonl").write_bytes(text.encode("windows-1252"))
    found = plan.check(root, change(root), STAGES)
    assert said(found)[0].startswith("source 'mine' has 300 bad rows of 300 (100.0%): not UTF-8 (300); the first: ")
    assert "iconv -f WINDOWS-1252 -t UTF-8" in found.problems[0].remedy
    # only some rows have letters beside ASCII
    (root / "data/raw/pairs.jsonl").write_bytes(text.replace("ü", "ue", 290).replace("ß", "ss", 290).encode("windows-1252"))
    found = plan.check(root, change(root), STAGES)
    assert said(found) == []
    (note,) = found.notes
    assert note.startswith(
        "source 'mine': 10 rows are not UTF-8, and would be left out; write a file in another encoding as UTF-8: `iconv "
    )


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_too_few_rows_are_told_in_the_words_of_stage_prepare(root: Path, count: int) -> None:
    write(root / "data/raw/pairs.jsonl", [pair(number) for number in range(count)] or [pair(1) | {"chosen": ""}])
    params = change(root, prepare__max_quarantined_share=1.0)
    (root / "job").mkdir()
    with pytest.raises(UserError) as refused:
        main(Job("prepare", params, root, root / "job", "cpu", 0, 1, 0))
    found = said(plan.check(root, params, STAGES))
    assert found
    assert "; ".join(found) == refused.value.what
    assert all("would be empty: no row of mine was left for split." in what for what in found)


def test_few_held_out_pairs_are_told(root: Path) -> None:
    write(root / "data/raw/pairs.jsonl", [pair(number) for number in range(60)])
    found = plan.check(root, change(root), STAGES)
    assert said(found) == []
    (note,) = found.notes
    assert note.startswith("heldout_pairs.jsonl would have 5 rows, and what is measured on so few says little: ppo, which takes ")


def test_a_slice_that_only_a_small_source_feeds_is_looked_at_beside_a_large_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "READ", 100)
    write(root / "data/raw/few.jsonl", [pair(number) for number in (1000, 1001)])
    (large,) = change(root).model_dump(mode="json")["data"]["sources"]
    few = large | {"name": "few", "path": "data/raw/few.jsonl", "split": dict.fromkeys(large["split"], 0) | {"judge": 0.1, "reward": 9}}
    params = change(root, data__sources=[large | {"split": large["split"] | {"judge": 0}}, few])
    (what,) = said(plan.check(root, params, STAGES))
    assert what.startswith("judge.jsonl would be empty: no row of few was left for split.judge ")


def test_rows_that_the_project_makes_can_be_too_few(root: Path) -> None:
    raw = yaml.safe_load((PROJECT / "presets/sandbox.yaml").read_text(encoding="utf-8"))["data"]["sources"]
    params = change(root, base=tiny_params()["base"], data__sources=[source | {"rows": 1} for source in raw])
    assert any(what.startswith("heldout_pairs.jsonl would be empty") for what in said(plan.check(root, params, STAGES)))


def test_texts_with_words_of_control_tokens_are_told(root: Path) -> None:
    odd = {"prompt": "<|user|>Hi<|end|>", "chosen": "Hello.", "rejected": "What?"}
    write(root / "data/raw/pairs.jsonl", [pair(number) if number else odd for number in range(150)])
    found = plan.check(root, change(root), STAGES)
    assert said(found) == []
    (note,) = found.notes
    start = "1 of 150 rows looked at hold words of control tokens (<|end|>, <|user|>), the first data/raw/pairs.jsonl:1 (source 'mine')"
    assert note.startswith(f"{start}: they are read as text; ")
