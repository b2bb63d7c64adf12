"""Answers that earlier versions left behind, in data/raw/earlier: `rlhf use` and `rlhf ingest` bring them (rlhf/registry/earlier.py).

A line is `{"prompt": turns, "answer": str}`, with `ended: false` where the answer was cut off, and what else a reward function reads of a
row: `source`, `reference`, `columns`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf.data.validate import digest_of, key_of_prompt
from rlhf.errors import UserError

FOLDER = Path("data/raw/earlier")
Line = Mapping[str, Any]
BRING = "`rlhf use params.yaml` brings them, where awac.versions is above 0"


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines.

    Raises:
        UserError: there are none, or one is not such a line.
    """
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = dict(json.loads(text))
                    if not isinstance(line["answer"], str) or not isinstance(line["prompt"], list):
                        raise TypeError
                except (ValueError, TypeError, KeyError):
                    raise UserError(f"{path}, line {number}: not an answer with its prompt", remedy=BRING) from None
                lines.append(line)
    if not lines:
        raise UserError(f"{folder}: no answers of earlier versions", remedy=BRING)
    return lines


def prompt_of(line: Line) -> bytes:
    """The same for lines of one prompt."""
    return digest_of(key_of_prompt(line["prompt"]))


def usable(
    lines: Sequence[Line], held_out: Iterable[Line] = (), fits: Callable[[int], bool] = lambda _: True
) -> tuple[list[int], dict[str, int]]:
    """Numbers of the lines to learn from, and how many were left out, by reason.

    An answer that was cut off would teach to end there, and one that is alone with its prompt is as good as the mean.

    Args:
        held_out: rows whose prompts nothing is trained on.
        fits: whether the line of a number is short enough.

    Raises:
        UserError: no prompt is left with two answers.
    """
    away = {prompt_of(row) for row in held_out}
    prompts = [prompt_of(line) for line in lines]
    allowed = [number for number in range(len(lines)) if prompts[number] not in away]
    whole = [number for number in allowed if lines[number].get("ended", True)]
    short = [number for number in whole if fits(number)]
    count = Counter(prompts[number] for number in short)
    several = [number for number in short if count[prompts[number]] > 1]
    kept = [len(each) for each in (lines, allowed, whole, short, several)]
    left_out = {name: more - less for name, (more, less) in zip(("held_out", "cut_off", "too_long", "alone"), pairwise(kept), strict=True)}
    if not several:
        raise UserError(
            f"{FOLDER}: of {len(lines)} answers no two are to one prompt that may be trained on ({counted(left_out)})",
            remedy="raise awac.versions, as each version adds answers (one trained with several to a prompt has enough by itself), or "
            "awac.max_tokens, if they are too long; or set awac.versions to 0",
        )
    return several, left_out


def counted(left_out: Mapping[str, int]) -> str:
    """How many were left out, for people."""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in left_out.items())
