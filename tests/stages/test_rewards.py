"""Rewards of several kinds in a stage that learns from its own answers: real stages on tiny models, real processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.job import read_lines
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params

FUNCTIONS = """
import time

def letters(answer):
    return len(answer)

def sometimes(answer):
    if len(answer) % 2:
        raise LookupError("an odd answer")
    return 1

def never(answer):
    raise LookupError("no answer will do")
"""
MODEL = {"name": "model", "kind": "model", "weight": 1.0}


def function(name: str, weight: float, **changes: Any) -> dict[str, Any]:
    entry = {"name": name, "kind": "function", "weight": weight, "function": f"my.py:{name}", "options": {}, "sources": None}
    return entry | {"right_from": None, "seconds": 20.0, "failure_score": -1.0, "max_failed_share": 1.0} | changes


def with_rewards(*entries: dict[str, Any]) -> dict[str, Any]:
    raw = tiny_params()
    raw["rewards"] = [MODEL, *entries]
    raw["ppo"] |= {"reward_clip": 100.0, "stop": {"kl": 1000.0, "score": 1000.0}}
    return raw


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all before ppo has run."""
    root = tmp_path_factory.mktemp("rewards") / "root"
    make_workspace(root, with_rewards(), pairs=240)
    (root / "my.py").write_text(FUNCTIONS, encoding="utf-8")
    run(root, "base", "sft", "reward")
    return root


def copy_of(workspace: Path, folder: Path, *entries: dict[str, Any]) -> Path:
    root = folder / "root"
    shutil.copytree(workspace, root)
    set_params(root, with_rewards(*entries))
    return root


def test_the_sum_is_trained_on_and_each_reward_is_logged(workspace: Path, tmp_path: Path) -> None:
    root = copy_of(workspace, tmp_path, function("letters", 0.5), function("sometimes", 0.0))
    said = run(root, "ppo")
    assert said.count("LookupError: an odd answer") == 1  # its first traceback alone
    assert "reward 'sometimes' failed for the first time, in step 1" in said
    rollouts = read_lines(root / "data/rollouts.jsonl")
    for row in rollouts:
        given = row["rewards"]
        assert given["letters"] == len(row["answer"])
        assert given["sometimes"] == (-1 if len(row["answer"]) % 2 else 1)
        assert row["score"] == pytest.approx(given["model"] + 0.5 * given["letters"], rel=1e-6)
    course = table(root / "plots/ppo.csv")
    first = [row["rewards"]["letters"] for row in rollouts if row["step"] == 1]
    assert float(course[0]["reward/letters"]) == pytest.approx(sum(first) / len(first))
    assert float(course[0]["reward/sometimes_failed"]) > 0
    assert {f"reward/letters{what}" for what in ("", "_std", "_zero", "_failed")} <= course[0].keys()
    # seconds are no output, and go to the log alone
    logged = read_lines(root / "runs/ppo/metrics.jsonl")[0]["metrics"]
    assert logged["reward/letters_seconds"] > 0
    assert not any("seconds" in name for name in json.loads((root / "metrics/ppo.json").read_text(encoding="utf-8")))


def test_ranks_and_a_kill_change_nothing(workspace: Path, tmp_path: Path) -> None:
    entries = (function("letters", 0.5), function("sometimes", 1.0))
    whole, killed, shared = (copy_of(workspace, tmp_path / name, *entries) for name in ("whole", "killed", "shared"))
    run(whole, "ppo")
    run(killed, "ppo:killed", code=-signal.SIGKILL)
    assert "ppo: goes on from step 2" in run(killed, "ppo")
    for path in ("models/ppo/model.safetensors", "data/rollouts.jsonl", "metrics/ppo.json", "plots/ppo.csv"):
        assert (killed / path).read_bytes() == (whole / path).read_bytes()
    run(shared, "ppo", ranks=2)
    first = [[row for row in read_lines(root / "data/rollouts.jsonl") if row["step"] == 1] for root in (whole, shared)]
    assert [row["rewards"]["letters"] for row in first[0]] == [row["rewards"]["letters"] for row in first[1]]


def test_a_reward_that_fails_on_too_many_answers_ends_the_stage(workspace: Path, tmp_path: Path) -> None:
    root = copy_of(workspace, tmp_path, function("never", 1.0, max_failed_share=0.5))
    said = run(root, "ppo", code=1)
    assert "reward 'never' (my.py:never) failed on 8 of 8 answers, more than max_failed_share (0.5) allows" in said
    assert said.count("LookupError: no answer will do") >= 1
    assert not (root / "models/ppo").exists()
