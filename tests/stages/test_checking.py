"""Accuracy, pass@k and majority, by hand; and an evaluation that a program judges, with real stages on tiny models."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.job import read_lines, write_lines
from rlhf.stages.checking import Checked, majority, numbers, pass_at
from tests.stage_runs import make_workspace, run, tiny_params
from tests.stages.test_rewards import MODEL, function


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer() -> None:
    assert pass_at(2, 1, 1) == 0.5
    assert pass_at(4, 1, 2) == pytest.approx(0.5)  # 1 − C(3,2)/C(4,2) = 1 − 3/6
    for n, right, k in itertools.product((1, 3, 6), range(7), (1, 2, 3)):
        if k > n or right > n:
            continue
        choices = list(itertools.combinations([i < right for i in range(n)], k))
        assert pass_at(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_commonest_result_decides_and_of_equal_ones_the_first() -> None:
    assert majority([False, True, True], ["a", "b", "b"])
    assert not majority([False, True, False], ["a", "b", "a"])
    assert majority([True, False], ["a", "b"])


def test_numbers_of_two_policies() -> None:
    rows: list[dict[str, Any]] = [
        {"source": "sums", "columns": {"kind": "plus"}},
        {"source": "sums", "columns": {"kind": "minus"}},
        {"source": "facts", "gold": {"kind": "plus"}},
    ]
    found = {
        "sft": Checked([[False, False], [True, False], [False, False]], [["1", "2"], ["3", "4"], ["5", "5"]]),
        "grpo": Checked([[True, True], [True, False], [False, True]], [["7", "7"], ["3", "4"], ["5", "6"]]),
    }
    told = numbers(rows, found, "grpo", lambda values: [float(values.min()), float(values.max())])
    assert told["sft"] == {"value": pytest.approx(1 / 6), "ci95": [0, 0.5]}
    assert told["grpo"] == {"value": pytest.approx(2 / 3), "ci95": [0.5, 1]}
    assert (told["difference"], told["ci95"]) == (pytest.approx(0.5), [0, 1])
    assert (told["prompts"], told["answers"]) == (3, 2)
    assert told["pass_at"] == {"sft": {"1": pytest.approx(1 / 6), "2": pytest.approx(1 / 3)}, "grpo": {"1": pytest.approx(2 / 3), "2": 1}}
    assert told["majority"] == {"sft": pytest.approx(1 / 3), "grpo": pytest.approx(2 / 3)}
    facts = {"n": 1, "sft": 0, "grpo": 0.5, "difference": 0.5, "ci95": [0.5, 0.5]}
    assert told["by_source"] == {"facts": facts, "sums": {"n": 2, "sft": 0.25, "grpo": 0.75, "difference": 0.5, "ci95": [0, 1]}}
    minus = {"n": 1, "sft": 0.5, "grpo": 0.5, "difference": 0, "ci95": [0, 0]}
    assert told["by_kind"] == {"minus": minus, "plus": {"n": 2, "sft": 0, "grpo": 0.75, "difference": 0.75, "ci95": [0.5, 1]}}
    assert isinstance(told["difference"], float)
    assert not isinstance(told["difference"], np.floating)


# ---------------------------------------------------------------------------------------------------------- real stages

SPLIT = {"text": 0, "sft": 0, "reward": 0, "ppo": 1, "judge": 0, "heldout": 1}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sums are checked and whose pairs are judged by a second reward model."""
    root = tmp_path_factory.mktemp("checked") / "root"
    raw = tiny_params()
    place = {"path": "data/raw/sums.jsonl", "hub": None, "revision": None, "hub_split": None, "weight": 1}
    columns = {"prompt": "prompt", "reference": "reference"}
    sums = {"name": "sums", "format": "verifiable", "columns": columns, "split": SPLIT, **place}
    raw["data"]["sources"].append(sums)
    checker = function("letters", 0.1, right_from=0.5, sources=["sums"], function="my.py:right")
    raw["rewards"] = [MODEL, checker, function("long", 0.0, function="my.py:long")]
    raw["evaluate"]["answers"] = 3
    root.mkdir()
    write_lines(
        root / "data/raw/sums.jsonl", [{"prompt": f"{n} + 1?", "reference": n, "kind": "odd" if n % 2 else "even"} for n in range(40)]
    )
    (root / "my.py").write_text(
        "def right(answer, reference):\n    return (len(answer) + reference) % 3 == 0\n\ndef long(answer):\n    return len(answer)\n",
        encoding="utf-8",
    )
    make_workspace(root, raw, pairs=240)
    run(root, "base", "sft", "reward", "ppo", "evaluate")
    return root


def test_a_run_with_a_model_and_a_checker_is_judged_by_both(evaluated: Path) -> None:
    found = json.loads((evaluated / "metrics/evaluate.json").read_text(encoding="utf-8"))
    assert found["win_rate"]["judge"].startswith("second reward model")
    accuracy = found["accuracy"]
    rows = read_lines(evaluated / "data/answers.jsonl")
    checked = [row for row in rows if row["right"]]
    assert {row["source"] for row in checked} == {"sums"}
    assert len(checked) == accuracy["prompts"] == 20
    assert accuracy["answers"] == 3
    for policy in ("sft", "ppo"):
        for row in checked:  # the first answer is the one that everything else is measured on
            assert row["right"][policy][0] == ((len(row["answers"][policy]) + row["reference"]) % 3 == 0)
        means = [sum(row["right"][policy]) / 3 for row in checked]
        assert accuracy[policy]["value"] == pytest.approx(sum(means) / 20)
        assert accuracy["pass_at"][policy]["1"] == pytest.approx(accuracy[policy]["value"])
    assert sum(part["n"] for part in accuracy["by_kind"].values()) == 20
    assert accuracy["by_source"]["sums"]["n"] == 20
    summary = json.loads((evaluated / "metrics/summary.json").read_text(encoding="utf-8"))
    assert summary["accuracy"] == accuracy["ppo"]["value"]
    assert summary["accuracy_difference_low"] == accuracy["ci95"][0]


def test_ranks_measure_the_same_accuracy(evaluated: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(evaluated, root)
    run(root, "evaluate", ranks=2)
    alone, shared = (json.loads((place / "metrics/evaluate.json").read_text(encoding="utf-8")) for place in (evaluated, root))
    assert shared["accuracy"] == alone["accuracy"]


@pytest.mark.parametrize("same", [True, False])
def test_a_champion_is_checked_as_evaluate_checked(evaluated: Path, tmp_path: Path, same: bool) -> None:
    root = tmp_path / "root"
    shutil.copytree(evaluated, root)
    (root / "version").mkdir()
    shutil.copytree(evaluated / "models/ppo", root / "version/model")
    shutil.copy(evaluated / "data/answers.jsonl", root / "version/evaluation.jsonl")
    (root / "runs/compare").mkdir(parents=True)
    champion = {"folder": str(root / "version/model"), "algorithm": "ppo", "same_evaluation": same}
    (root / "runs/compare/champion.json").write_text(json.dumps(champion), encoding="utf-8")
    run(root, "compare")
    rows = read_lines(root / "runs/compare/out/comparison.jsonl")
    checked = [row for row in rows if "right" in row]
    assert len(checked) == 20
    assert all(row["right"]["new"] == row["right"]["champion"] for row in checked)
    assert {row["kind"] for row in checked} == {"odd", "even"}


def test_what_no_held_out_prompt_is_for_is_an_error(evaluated: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(evaluated, root)
    prompts = [row for row in read_lines(root / "data/prepared/heldout_prompts.jsonl") if "source" not in row]
    write_lines(root / "data/prepared/heldout_prompts.jsonl", prompts)
    assert "no held-out prompt is of the sources that the entries of `rewards` with right_from are for" in run(root, "evaluate", code=1)
