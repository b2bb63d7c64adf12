"""Answers of each step as one table that MLflow knows for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas

from rlhf import tracking
from rlhf.tracking import samples
from tests.tracking.test_tracking import PARAMS, database, root, state, tracked  # noqa: F401  # fixtures


def rollouts(path: Path, steps: int, answers: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "prompt": [{"role": "user", "content": "Hi"}], "gold": None, "source": "sums", "reference": [1], "columns": {}}
        | {"answer": f"answer {step}.{number}", "kl": 0.5, "score": 2.0, "rewards": {"model": 1.0, "right": 1.0}}
        for step in range(1, steps + 1)
        for number in range(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9', encoding="utf-8")  # a line under way
    return path


def test_a_run_has_its_answers_as_one_table(root: Path, tracked: Callable[..., Path]) -> None:  # noqa: F811
    rollouts(root / "runs/sft/table/rollouts.jsonl", 3, 20)
    folder = tracked("table", 1)
    run = state(folder)["run"]
    client = tracking.client(root, PARAMS)
    # `client.load_table` would ask the server that this process asked last
    found = pandas.read_json(client.download_artifacts(run, samples.ARTIFACT, str(root)), orient="split")
    assert list(found.columns) == ["step", "source", "prompt", "reference", "answer", "score", "reward/model", "reward/right", "kl"]
    assert found["step"].value_counts().to_dict() == {1: 8, 2: 8, 3: 8}
    assert list(found[found["step"] == 2]["answer"])[:2] == ["answer 2.0", "answer 2.1"]


def test_of_many_steps_some_are_chosen_evenly(tmp_path: Path) -> None:
    chosen = samples.chosen(rollouts(tmp_path / "rollouts.jsonl", 31), 4)
    assert [step[0]["step"] for step in chosen] == [1, 11, 21, 31]
    assert samples.chosen(tmp_path / "none.jsonl", 4) == []
    assert not samples.write(tmp_path / "none.jsonl", tmp_path / "table.json")
