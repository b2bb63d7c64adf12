"""ppo and grpo with a bandit that chooses values: kills, what the updates then learn by, and the table of it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.job import read_lines
from rlhf.tracking import pictures
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params
from tests.stages.test_sharding import make_models

CLUSTERS = {"policy_clip": [[0.2, 0.2], [0.1, 0.3]], "epochs": [2, 1], "kl_coefficient": [0.1, 0.5], "learning_rate_factor": [1.0, 4.0]}


def params_of(stage: str, clusters: dict[str, Any] | None) -> dict[str, Any]:
    raw = tiny_params() | {"algorithm": stage}
    # a bandit that explores alone goes through all values
    raw[stage] |= {"steps": 10, "ultho": {"clusters": clusters, "kl_weight": 0.1, "window": 3, "exploration": 100.0} if clusters else None}
    raw["ppo"]["kl"]["controller"] = "fixed"
    raw["grpo"]["kl"]["coefficient"] = 0.1
    return raw


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    root = tmp_path_factory.mktemp("tuning") / "start"
    make_workspace(root, tiny_params(), pairs=120)
    make_models(root, tokenizer)
    return root


def place(start: Path, root: Path, raw: dict[str, Any]) -> Path:
    shutil.copytree(start, root)
    set_params(root, raw)
    return root


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_run_killed_with_the_bandit_under_way_goes_on_to_the_same_bytes(start: Path, tmp_path: Path, stage: str) -> None:
    roots = [place(start, tmp_path / name, params_of(stage, CLUSTERS)) for name in ("root", "unbroken")]
    run(roots[0], f"{stage}:killed", code=-signal.SIGKILL)
    said = run(tmp_path, f"root/{stage}", f"unbroken/{stage}")
    assert f"{stage}: goes on from step 2" in said
    for path in (f"models/{stage}/model.safetensors", f"plots/{stage}.csv", "plots/ultho.csv", "data/rollouts.jsonl"):
        assert (roots[0] / path).read_bytes() == (roots[1] / path).read_bytes(), path
    chosen, course = table(roots[1] / "plots/ultho.csv"), table(roots[1] / f"plots/{stage}.csv")
    assert [row["step"] for row in chosen] == [str(step) for step in range(1, 11)]
    # each update goes by the values in force
    assert len({row["epochs"] for row in chosen}) == 2
    assert [float(row["updates"]) for row in course] == [2 * float(row["epochs"]) for row in chosen]
    if stage == "ppo":
        assert [row["beta"] for row in course] == [row["kl_coefficient"] for row in chosen]
        assert chosen[0]["kl_coefficient"] == chosen[1]["kl_coefficient"] == "0.1"
    for row, other in zip(chosen, course, strict=True):
        assert float(row["signal"]) == pytest.approx(float(other["reward"]) - 0.1 * float(other["kl"]), abs=1e-6)
    pictures.draw(roots[1] / "plots/ultho.csv", {"x": "step"})
    assert (roots[1] / "plots/ultho.png").is_file()


def test_a_bandit_with_nothing_but_the_first_values_in_force_changes_nothing(start: Path, tmp_path: Path) -> None:
    raw = params_of("ppo", {"learning_rate_factor": [1.0, 4.0]})
    raw["ppo"]["ultho"]["exploration"] = 0.0
    raw["ppo"]["steps"] = 2  # it begins with the second: the first is the critic's
    place(start, tmp_path / "on", raw)
    raw["ppo"]["ultho"] = None
    place(start, tmp_path / "off", raw)
    run(tmp_path, "on/ppo", "off/ppo")
    assert not (tmp_path / "off/plots/ultho.csv").exists()
    for path in ("models/ppo/model.safetensors", "plots/ppo.csv", "data/rollouts.jsonl"):
        assert (tmp_path / "on" / path).read_bytes() == (tmp_path / "off" / path).read_bytes(), path
    assert len(read_lines(tmp_path / "on/data/rollouts.jsonl")) == 16
