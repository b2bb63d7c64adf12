"""Several answers to a prompt as pairs, and what stands beside the rows of public datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.data.formats import BY_DESIGN, Quarantined, Row
from tests.data.test_named import ROWS, changed, results


def rated(prompt: str, response: str, *ratings: int) -> dict[str, Any]:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, (*ratings, 1, 1), strict=True))}


def test_answers_of_helpsteer_that_follow_each_other_are_compared(tmp_path: Path) -> None:
    rows = [rated("a", "fair", 3, 3, 4), rated("a", "good", 3, 4, 4), rated("a", "bad", 3, 3, 3)]
    rows += [rated("b", "alone", 4, 4, 4), rated("c", "same", 1, 1, 1), rated("c", "same too", 1, 1, 1), {"response": "x"}]
    pair, alone, same, without = results("helpsteer", rows, tmp_path)
    assert isinstance(pair, Row)
    assert (pair.line, pair.prompt, pair.chosen, pair.rejected) == (1, ({"role": "user", "content": "a"},), "good", "bad")
    found = [(row.line, row.reason) for row in (alone, same, without) if isinstance(row, Quarantined)]
    assert found == [
        (4, "no pair: 1 answer to this prompt"),
        (5, "tie: all 2 answers have the same rank"),
        (7, "malformed: no column 'prompt'"),
    ]
    assert {"no pair", "tie"} <= BY_DESIGN


def test_earlier_rounds_and_tools_beside_the_row(tmp_path: Path) -> None:
    alpaca = ROWS["alpaca"][0] | {"history": [["Hi!", "Yes?"]], "system": "Be brief."}
    (row,) = results("alpaca", [alpaca], tmp_path)
    assert isinstance(row, Row)
    assert [turn["role"] for turn in row.prompt] == ["system", "user", "assistant", "user"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    (row,) = results("openai-preference", [changed("openai-preference", ("input", "tools"), tools)], tmp_path)
    assert isinstance(row, Row)
    assert row.prompt == ({"role": "user", "content": "Why?", "tools": tools},)
