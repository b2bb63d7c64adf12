"""Dealing rows to the slices that stages read, and keeping what is held out away from training."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from rlhf.config.data import SLICES, Split
from rlhf.data.formats import Row

Key = tuple[str, ...]
Item = TypeVar("Item")


def key_of(row: Row) -> Key:
    """What must not stand both in training and in the held-out rows: the prompt, or the passage."""
    if row.text is not None:
        return (row.text.strip(),)
    return tuple(part for turn in row.prompt for part in (turn["role"], turn["content"].strip()))


def targets(count: int, split: Split) -> dict[str, int]:
    """How many of `count` rows each slice gets: shares by largest remainder, so that the sum is `count`."""
    weights = {name: getattr(split, name) for name in SLICES if split.uses(name)}
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    dealt = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: dealt[name] - exact[name])
    for name in by_remainder[: count - sum(dealt.values())]:
        dealt[name] += 1
    return dealt


def deal(rows: Sequence[Row], split: Split, generator: random.Random) -> dict[str, list[Row]]:
    """Each row to one slice, rows with the same prompt to the same one. Sizes are those of `targets` where prompts do not repeat."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    missing = targets(len(rows), split)
    dealt: dict[str, list[Row]] = {name: [] for name in missing}
    for group in shuffled(list(groups.values()), generator):
        name = max(missing, key=lambda name: missing[name])
        dealt[name] += group
        missing[name] -= len(group)
    return dealt


def without_leaks(slices: Mapping[str, Sequence[Row]]) -> tuple[dict[str, list[Row]], list[Row]]:
    """The slices without those training rows whose prompt or passage is also held out, and the rows removed."""
    held_out = {key_of(row) for row in slices["heldout"]}
    kept = {name: [row for row in rows if name == "heldout" or key_of(row) not in held_out] for name, rows in slices.items()}
    removed = [row for name, rows in slices.items() if name != "heldout" for row in rows if key_of(row) in held_out]
    return kept, removed


def shuffled(items: Sequence[Item], generator: random.Random) -> list[Item]:
    """The items in a new order."""
    return generator.sample(items, len(items))
