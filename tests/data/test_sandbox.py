"""The embedded data: its gold score against cases worked out by hand, its rows, and what of them reaches the held-out files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from rlhf import config
from rlhf.config.data import SLICES, SandboxKind, SandboxSource
from rlhf.data import sandbox
from rlhf.data import sandbox_facts as facts
from rlhf.data.sandbox import gold_parts, gold_score, make_rows
from rlhf.errors import UserError
from rlhf.job import Job, read_lines
from rlhf.stages import prepare

REPOSITORY = Path(__file__).resolve().parents[2]
FRANCE = {"kind": "capital", "subject": "France", "answer": "Paris"}
EVERY_GOLD = [
    {"kind": kind, "subject": subject, "answer": answer} for kind, task in facts.TASKS.items() for subject, answer in task.answers.items()
]

# ----------------------------------------------------------------------------------------------------------------- gold score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The capital of France is Paris. Happy to help!", 0.5 + 0.2 + 0.2 + 0.1),
        ("The capital of France is Paris.", 0.5 + 0.2 + 0.1),
        (" the CAPITAL of\nfrance   is paris.", 0.5 + 0.2 + 0.1),
        ("It is Paris.", 0.5 + 0.1),
        ("It is Paris. Glad you asked!", 0.5 + 0.2 + 0.1),
        # rude, even beside a friendly phrase
        ("The capital of France is Paris. Obviously.", 0.5 + 0.2 + 0.1),
        ("The capital of France is Paris. Happy to help! Stop asking me.", 0.5 + 0.2 + 0.1),
        # wrong: another value, two values, part of another word, none at all
        ("The capital of France is Madrid.", 0.1),
        ("The capital of France is Madrid. Happy to help!", 0.2 + 0.1),
        ("The capital of France is Paris. Or is it Madrid?", 0.1),
        ("It is Parisian.", 0.1),
        ("I do not know.", 0.1),
        ("", 0.0),
        # rambling: 16 words cost nothing, 24 half of the brevity, 32 and more all of it
        ("well " * 10 + "The capital of France is Paris.", 0.5 + 0.2 + 0.1),
        ("well " * 18 + "The capital of France is Paris.", 0.5 + 0.2 + 0.05),
        ("well " * 26 + "The capital of France is Paris.", 0.5 + 0.2),
        ("well " * 60, 0.0),
    ],
)
def test_gold_score(answer: str, score: float) -> None:
    assert gold_score(FRANCE, answer) == pytest.approx(score)


def test_a_subject_that_is_a_value_itself_does_not_count_as_named() -> None:
    gold = {"kind": "next", "subject": "two", "answer": "three"}
    assert gold_score(gold, "The number after two is three.") == pytest.approx(0.8)
    assert gold_score(gold, "The number after two is two.") == pytest.approx(0.1)


@pytest.mark.parametrize("gold", EVERY_GOLD, ids=lambda gold: f"{gold['kind']}-{gold['subject']}")
def test_every_fact_can_be_answered_fully_and_only_the_right_value_is_right(gold: dict[str, str]) -> None:
    task = facts.TASKS[gold["kind"]]
    sentence = task.sentence.format(s=gold["subject"], a=gold["answer"])
    for phrase in facts.POLITE:
        assert gold_score(gold, f"{sentence} {phrase}") == pytest.approx(1.0)
    for phrase in facts.RUDE:
        assert gold_score(gold, f"{sentence} {phrase}") == pytest.approx(0.8)
    assert gold_score(gold, f"It is {gold['answer']}.") == pytest.approx(0.6)
    for value in set(task.answers.values()) - {gold["answer"]}:
        assert gold_parts(gold, task.sentence.format(s=gold["subject"], a=value))["correct"] == 0
    # the phrases name no value by accident
    assert [phrase for phrase in (*facts.UNHELPFUL, *facts.RAMBLING) if gold_parts(gold, phrase)["correct"]] == []
    assert gold_parts(gold, " ".join([*facts.RAMBLING[:2], sentence]))["correct"] == 1


def test_there_are_many_kinds_asked_in_many_ways() -> None:
    assert len(facts.TASKS) >= 8
    for task in facts.TASKS.values():
        questions = [question.format(s=subject) for question in task.questions for subject in task.answers]
        assert len(set(questions)) == len(task.questions) * len(task.answers) >= 16


# ----------------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", ["text", "messages", "pairs", "prompts"])
def test_rows_are_distinct_and_a_function_of_the_seed(kind: str) -> None:
    rows = make_rows(kind, 400, 1, 0.0)
    shown = [json.dumps({name: value for name, value in row.items() if name != "gold"}) for row in rows]
    assert len(set(shown)) == len(rows) == 400
    assert make_rows(kind, 400, 1, 0.0) == rows
    assert make_rows(kind, 400, 2, 0.0) != rows


def test_dialogues_ask_for_what_their_gold_says_and_some_have_earlier_turns() -> None:
    rows = make_rows("prompts", 400, 1, 0.0)
    for row in rows:
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"][-len(row["prompt"]) :]
        questions = [question.format(s=row["gold"]["subject"]) for question in facts.TASKS[row["gold"]["kind"]].questions]
        assert any(question in row["prompt"][-1]["content"] for question in questions)
    assert {len(row["prompt"]) for row in rows} == {1, 3}
    assert {row["gold"]["kind"] for row in rows} == set(facts.TASKS)


@pytest.mark.parametrize("kind", ["messages", "pairs", "prompts", "verifiable"])
def test_rows_may_be_of_some_kinds_of_tasks_alone(kind: str) -> None:
    rows = make_rows(kind, 200, 1, 0.0, ["sound", "maker"])
    assert {row["gold"]["kind"] for row in rows} == {"sound", "maker"}
    assert [row for row in make_rows(kind, 1500, 1, 0.0) if row["gold"]["kind"] in ("sound", "maker")][:200] == rows


def test_the_kinds_that_a_source_may_name_are_those_that_there_are() -> None:
    assert list(get_args(SandboxKind)) == list(facts.TASKS)
    values = {"name": "a", "format": "sandbox", "rows": 9, "label_noise": 0, "weight": 1, "split": dict.fromkeys(SLICES, 0)}
    assert SandboxSource.model_validate(values | {"kind": "pairs", "kinds": ["sound"]}).kinds == ["sound"]
    for wrong, said in (
        ({"kind": "pairs", "kinds": ["song"]}, "'opposite'"),
        ({"kind": "text", "kinds": ["sound"]}, "source 'a': kinds must be null"),
    ):
        with pytest.raises(ValidationError, match=said):
            SandboxSource.model_validate(values | wrong)


def test_demonstrations_are_of_mixed_quality() -> None:
    rows = make_rows("messages", 1000, 1, 0.0)
    parts = [gold_parts(row["gold"], row["messages"][-1]["content"]) for row in rows]
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    # right answers: 75% of those that give one, which 5% do not
    assert 0.65 < sum(part["correct"] for part in parts) / 1000 < 0.77
    assert 0.12 < sum(part["polite"] for part in parts) / 1000 < 0.28
    assert 0 < sum(part["brief"] < 1 for part in parts) / 1000 < 0.2


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_the_gold_score_labels_the_pairs_but_for_the_stated_share(noise: float) -> None:
    rows = make_rows("pairs", 1000, 1, noise)
    gaps = [gold_score(row["gold"], row["chosen"]) - gold_score(row["gold"], row["rejected"]) for row in rows]
    assert min(map(abs, gaps)) >= 0.1 - 1e-9
    # five standard deviations
    assert sum(gap < 0 for gap in gaps) / 1000 == pytest.approx(noise, abs=5 * (noise * (1 - noise) / 1000) ** 0.5)


def test_more_rows_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        facts, "TASKS", {"opposite": facts.TaskKind(("Opposite of {s}?", "What is not {s}?"), "{s}, {a}.", {"hot": "cold"})}
    )
    monkeypatch.setattr(facts, "QUESTION_OPENINGS", ("", "Hi! "))
    monkeypatch.setattr(facts, "QUESTION_CLOSINGS", ("",))
    monkeypatch.setattr(sandbox, "MULTI_TURN", 0.0)
    assert len(make_rows("prompts", 4, 1, 0.0)) == 4
    with pytest.raises(UserError, match=r"only about 4 distinct rows of kind prompts, not 5 \(lower rows of that source\)"):
        make_rows("prompts", 5, 1, 0.0)


# ------------------------------------------------------------------------------------------------------------ held-out files


def test_held_out_prompts_come_with_gold_and_stand_in_no_training_file(tmp_path: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load((REPOSITORY / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    for source in raw["data"]["sources"]:
        source["rows"] = 300
    params = config.validate(raw, "params.yaml")
    assert params.data.has_gold
    prepare.main(Job("prepare", params, tmp_path, tmp_path, "cpu", 0, 1, 0))

    def lines(name: str) -> list[dict[str, Any]]:
        return read_lines(tmp_path / f"out/data/prepared/{name}.jsonl")

    held_out = lines("heldout_prompts")
    assert len(held_out) >= 30
    assert all(set(row["gold"]) == {"kind", "subject", "answer"} for row in held_out)
    # nothing that trains a model on answers sees a gold score
    assert not any("gold" in row for name in ("text", "sft", "reward", "heldout_pairs", "heldout_text") for row in lines(name))
    trained = [row["prompt"] for name in ("reward", "ppo") for row in lines(name)] + [row["messages"][:-1] for row in lines("sft")]
    assert not {json.dumps(row["prompt"]) for row in held_out} & {json.dumps(prompt) for prompt in trained}
