"""Which rows are refused and why, how the others are dealt, and what is taken out of training."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rlhf.config.data import SLICES, Split
from rlhf.data.fields import Turns
from rlhf.data.formats import Quarantined, Row
from rlhf.data.split import targets
from rlhf.data.validate import Checker, turns_problem
from tests.data.test_blend import Numbered


def turns(*pairs: tuple[str, str]) -> Turns:
    return tuple({"role": role, "content": content} for role, content in pairs)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


def pair(line: int, prompt: str = "Why?", chosen: str = "So.", rejected: str = "Dunno.", file: str = "a.jsonl") -> Row:
    return Row("mine", file, line, "pairs", turns(("user", prompt)), chosen, rejected)


def passage(line: int, text: str) -> Row:
    return Row("mine", "a.jsonl", line, "text", text=text)


def split(**shares: float) -> Split:
    return Split(**(dict.fromkeys(SLICES, 0.0) | shares))


# ----------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair(1), None),
        (pair(1, chosen="  "), "empty: chosen"),
        (pair(1, rejected=""), "empty: rejected"),
        (pair(1, prompt=" \n"), "empty: turn 1 (user)"),
        (pair(1, chosen="Dunno."), "chosen equals rejected"),
        (pair(1, prompt="y" * 30, chosen="n" * 21), "over-long: 51 characters, at most 50"),
        (pair(1, prompt="y" * 30, chosen="n" * 20), None),
        (passage(1, ""), "empty: text"),
        (passage(1, "t" * 51), "over-long: 51 characters, at most 50"),
        (passage(1, "t" * 50), None),
    ],
)
def test_checks_of_one_row(row: Row, expected: str | None) -> None:
    assert Checker(50).problem(row) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (turns(("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u")), None),
        ((), "malformed: no user turn before the answer"),
        (turns(("system", "s")), "malformed: no user turn before the answer"),
        (turns(("user", "u"), ("assistant", "a")), "malformed: no user turn before the answer"),
        ((*turns(("user", "u")), CALL, *turns(("tool", "t"), ("tool", "t"))), None),
        ((*turns(("user", "u")), CALL), "malformed: no user turn before the answer"),
        ((*turns(("user", "u")), CALL, *turns(("user", "u"))), "malformed: turn 3 is of role 'user' where 'tool' must stand"),
        (turns(("user", "u"), ("tool", "t")), "malformed: turn 2 is of role 'tool' where 'assistant' must stand"),
        (turns(("assistant", "a"), ("user", "u")), "malformed: turn 1 is of role 'assistant' where 'user' must stand"),
        (turns(("system", "s"), ("user", "u"), ("user", "u")), "malformed: turn 3 is of role 'user' where 'assistant' must stand"),
        (turns(("user", "u"), ("system", "s")), "malformed: turn 2 is of role 'system' where 'assistant' must stand"),
        (turns(("human", "u")), "malformed: turn 1 has role 'human', not system, user, assistant or tool"),
    ],
)
def test_turns(prompt: Turns, expected: str | None) -> None:
    assert turns_problem(prompt) == expected


def test_repetitions_within_and_across_sources() -> None:
    demonstration = Row("mine", "a.jsonl", 9, "messages", turns(("user", "Why?")), "So.")
    rows: list[Row | Quarantined] = [
        pair(1),
        pair(2, chosen="Since."),
        pair(3),
        pair(4, chosen="Dunno.", rejected="So."),
        demonstration,
        pair(1, file="b.jsonl"),
        Quarantined("mine", "b.jsonl", 2, "malformed: x", "raw"),
        passage(5, "One."),
        passage(6, "One."),
    ]
    good, bad = Checker(100).divide(rows)
    assert good == [rows[0], rows[1], demonstration, rows[7]]
    assert [(row.file, row.line, row.reason) for row in bad] == [
        ("a.jsonl", 3, "duplicate: same as line 1 of a.jsonl"),
        ("a.jsonl", 4, "contradiction: prefers the opposite of line 1 of a.jsonl"),
        ("b.jsonl", 1, "duplicate: same as line 1 of a.jsonl"),
        ("b.jsonl", 2, "malformed: x"),
        ("a.jsonl", 6, "duplicate: same as line 5 of a.jsonl"),
    ]
    assert bad[0].row == {"prompt": turns(("user", "Why?")), "chosen": "So.", "rejected": "Dunno."}
    assert Counter(row.category for row in bad) == {"duplicate": 3, "contradiction": 1, "malformed": 1}


# ---------------------------------------------------------------------------------------------------------------- dealing


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (10, {"sft": 0.5, "heldout": 0.5}, {"sft": 5, "heldout": 5}),
        (10, {"sft": 1, "reward": 1, "ppo": 1}, {"sft": 4, "reward": 3, "ppo": 3}),
        (7, {"text": 3, "sft": 2, "heldout": 2}, {"text": 3, "sft": 2, "heldout": 2}),
        (1, {"sft": 0.4, "heldout": 0.6}, {"sft": 0, "heldout": 1}),
        (0, {"sft": 1}, {"sft": 0}),
    ],
)
def test_targets_add_up(count: int, shares: dict[str, float], expected: dict[str, int]) -> None:
    assert targets(count, split(**shares)) == expected


def dealt(rows: list[Row], shares: Split, seed: str) -> tuple[Numbered, dict[str, list[int]]]:
    numbered = Numbered({"mine": rows})
    return numbered, {name: part.tolist() for name, part in numbered.deal("mine", shares, random.Random(seed)).items()}


def test_deal_is_exact_seeded_and_loses_nothing() -> None:
    rows = [pair(line, prompt=f"{line}?") for line in range(100)]
    shares = split(sft=0.7, reward=0.2, heldout=0.1)
    _, parts = dealt(rows, shares, "a")
    assert {name: len(part) for name, part in parts.items()} == {"sft": 70, "reward": 20, "heldout": 10}
    assert sorted(number for part in parts.values() for number in part) == list(range(100))
    assert parts == dealt(rows, shares, "a")[1]
    assert parts != dealt(rows, shares, "b")[1]
    assert parts["sft"] != sorted(parts["sft"])


def test_deal_keeps_rows_of_one_prompt_together() -> None:
    rows = [pair(line, prompt=f"{line % 20}?") for line in range(60)]
    numbered, parts = dealt(rows, split(reward=0.5, heldout=0.5), "a")
    assert {name: len(part) for name, part in parts.items()} == {"reward": 30, "heldout": 30}
    _, removed = numbered.leaks({name: [rows[number] for number in parts.get(name, [])] for name in SLICES})
    assert removed == []


def test_leaks_are_removed_from_training_only() -> None:
    demonstration = Row("mine", "a.jsonl", 9, "messages", turns(("user", " Why? ")), "Another answer.")
    slices: dict[str, list[Row]] = {name: [] for name in SLICES}
    slices |= {"heldout": [pair(1), passage(2, "One.")], "sft": [demonstration, pair(3, prompt="How?")], "judge": [pair(4, chosen="Hm.")]}
    slices |= {"text": [passage(5, "One. "), passage(6, "Two.")], "reward": [pair(7, prompt="How?")]}
    kept, removed = Numbered(slices).leaks(slices)
    assert {name: [row.line for row in rows] for name, rows in kept.items() if rows} == {
        "heldout": [1, 2],
        "sft": [3],
        "text": [6],
        "reward": [7],
    }
    assert sorted(row.line for row in removed) == [4, 5, 9]
