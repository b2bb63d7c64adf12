"""Dealing rows to the slices that stages read, keeping what is held out away from training, and blending sources by weight."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rlhf.config.data import SLICES, Source, Split
from rlhf.data.formats import Row

Key = tuple[str, ...]
Item = TypeVar("Item")
Seeded = Callable[..., random.Random]  # a generator of its own for each purpose


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


def deal(rows: Sequence[Row], split: Split, generator: random.Random, placed: Mapping[Key, str]) -> dict[str, list[Row]]:
    """Each row to one slice, rows with the same prompt to the same one. Sizes are those of `targets` where prompts do not repeat.

    Args:
        placed: the training slice of prompts that other sources hold too; they go there if `split` uses it.
    """
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    missing = targets(len(rows), split)
    dealt: dict[str, list[Row]] = {name: [] for name in missing}
    bound = {key: placed[key] for key in groups if placed.get(key) in missing}
    # bound ones first, so that the others can fill what is missing
    for key in sorted(shuffled(list(groups), generator), key=lambda key: key not in bound):
        name = bound.get(key) or max(missing, key=lambda name: missing[name])
        dealt[name] += groups[key]
        missing[name] -= len(groups[key])
    return dealt


def deal_sources(good: Mapping[str, Sequence[Row]], sources: Sequence[Source], seeded: Seeded) -> dict[str, list[Row]]:
    """The rows of every source, dealt to the slices by its split. No row is in two slices.

    A prompt that several divided sources hold goes to one training slice, but where their splits have none in common; those that feed
    fewer slices are dealt first, so that the others follow them. A source for one training slice is used there whole, whatever the others
    hold.
    """
    parts: dict[str, dict[str, list[Row]]] = {}
    placed: dict[Key, str] = {}
    for source in sorted(sources, key=lambda source: len(trained(source.split))):
        divided = len(trained(source.split)) > 1
        part = parts[source.name] = deal(good[source.name], source.split, seeded("split", source.name), placed if divided else {})
        if divided:
            for name in trained(source.split):
                placed |= {key_of(row): name for row in part[name] if key_of(row) not in placed}
    return {name: [row for source in sources for row in parts[source.name].get(name, [])] for name in SLICES}


def trained(split: Split) -> list[str]:
    """The slices that a split feeds, but for heldout."""
    return [name for name in SLICES if name != "heldout" and split.uses(name)]


def shared_prompts(slices: Mapping[str, Sequence[Row]]) -> int:
    """Prompts that stand in more than one training slice, out of different sources."""
    places = Counter(key for name, rows in slices.items() if name != "heldout" for key in {key_of(row) for row in rows})
    return sum(count > 1 for count in places.values())


def without_leaks(slices: Mapping[str, Sequence[Row]]) -> tuple[dict[str, list[Row]], list[Row]]:
    """The slices without those training rows whose prompt or passage is also held out, and the rows removed."""
    held_out = {key_of(row) for row in slices["heldout"]}
    kept = {name: [row for row in rows if name == "heldout" or key_of(row) not in held_out] for name, rows in slices.items()}
    removed = [row for name, rows in slices.items() if name != "heldout" for row in rows if key_of(row) in held_out]
    return kept, removed


def blend(rows: Sequence[Row], weights: Mapping[str, float], seeded: Seeded) -> list[Row]:
    """Each row as often as the weight of its source says: ⌊w⌋ times, and a random w − ⌊w⌋ of the source's rows once more.

    Repetitions stand one pass behind the other, so that no row follows itself.
    """
    times = [int(weights[row.source]) for row in rows]
    for source, weight in weights.items():
        own = [place for place, row in enumerate(rows) if row.source == source]
        for place in seeded("weight", source).sample(own, round(weight % 1 * len(own))):
            times[place] += 1
    return [row for number in range(max(times, default=0)) for row, count in zip(rows, times, strict=True) if count > number]


def shuffled(items: Sequence[Item], generator: random.Random) -> list[Item]:
    """The items in a new order."""
    return generator.sample(items, len(items))
