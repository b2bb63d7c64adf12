"""Dealing rows to the slices that stages read, keeping what is held out away from training, and blending sources by weight.

Rows are numbers. `prompts` holds for each row the number of the first one with the same prompt or passage.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf.config.data import SLICES, Source, Split

Numbers = NDArray[np.int64]
Seeded = Callable[..., random.Random]  # a generator of its own for each purpose


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


def deal(rows: Numbers, prompts: Numbers, split: Split, generator: random.Random, placed: NDArray[np.int8]) -> dict[str, Numbers]:
    """Each row to one slice, rows with the same prompt to the same one. Sizes are those of `targets` where prompts do not repeat.

    Args:
        placed: by prompt, the training slice (its number in SLICES) of those that other sources hold too, else -1; they go there if
            `split` uses it.
    """
    groups, first, group_of, sizes = np.unique(prompts[rows], return_index=True, return_inverse=True, return_counts=True)
    missing = targets(len(rows), split)
    bound = np.isin(placed[groups], [SLICES.index(name) for name in missing])
    order = shuffled(np.argsort(first), generator)
    # bound ones first, so that the others can fill what is missing
    order = np.concatenate([order[bound[order]], order[~bound[order]]])
    slice_of = np.empty(len(groups), np.int8)
    for group in order:
        name = SLICES[placed[groups[group]]] if bound[group] else max(missing, key=missing.__getitem__)
        missing[name] -= int(sizes[group])
        slice_of[group] = SLICES.index(name)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups))
    by_rank = np.argsort(rank[group_of], kind="stable")
    return {name: rows[by_rank[slice_of[group_of[by_rank]] == SLICES.index(name)]] for name in missing}


def deal_sources(good: Mapping[str, Numbers], prompts: Numbers, sources: Sequence[Source], seeded: Seeded) -> dict[str, Numbers]:
    """The rows of every source, dealt to the slices by its split. No row is in two slices.

    A prompt that several divided sources hold goes to one training slice, but where their splits have none in common; those that feed
    fewer slices are dealt first, so that the others follow them. A source for one training slice is used there whole, whatever the others
    hold.
    """
    parts: dict[str, dict[str, Numbers]] = {}
    nowhere = np.full(len(prompts), -1, np.int8)
    placed = nowhere.copy()
    for source in sorted(sources, key=lambda source: len(trained(source.split))):
        divided = len(trained(source.split)) > 1
        seed = seeded("split", source.name)
        part = parts[source.name] = deal(good[source.name], prompts, source.split, seed, placed if divided else nowhere)
        for name in trained(source.split) if divided else ():
            own = prompts[part[name]]
            placed[own[placed[own] < 0]] = SLICES.index(name)
    none = np.empty(0, np.int64)
    return {name: np.concatenate([parts[source.name].get(name, none) for source in sources]) for name in SLICES}


def trained(split: Split) -> list[str]:
    """The slices that a split feeds, but for heldout."""
    return [name for name in SLICES if name != "heldout" and split.uses(name)]


def shared_prompts(slices: Mapping[str, Numbers], prompts: Numbers) -> int:
    """Prompts that stand in more than one training slice, out of different sources."""
    places = np.zeros(len(prompts), np.int8)
    for name, rows in slices.items():
        if name != "heldout":
            places[np.unique(prompts[rows])] += 1
    return int((places > 1).sum())


def without_leaks(slices: Mapping[str, Numbers], prompts: Numbers) -> tuple[dict[str, Numbers], Numbers]:
    """The slices without those training rows whose prompt or passage is also held out, and the rows removed."""
    held_out = np.zeros(len(prompts), bool)
    held_out[prompts[slices["heldout"]]] = True
    kept = {name: rows if name == "heldout" else rows[~held_out[prompts[rows]]] for name, rows in slices.items()}
    removed = [rows[held_out[prompts[rows]]] for name, rows in slices.items() if name != "heldout"]
    return kept, np.concatenate(removed)


def one_of_each_prompt(rows: Numbers, prompts: Numbers) -> Numbers:
    """The first of the rows of each prompt."""
    _, first = np.unique(prompts[rows], return_index=True)
    return rows[np.sort(first)]


def blend(rows: Numbers, source_of: NDArray[np.int16], weights: Mapping[str, float], seeded: Seeded) -> Numbers:
    """Each row as often as the weight of its source says: ⌊w⌋ times, and a random w − ⌊w⌋ of the source's rows once more.

    Repetitions stand one pass behind the other, so that no row follows itself.

    Args:
        source_of: for each row, which one of the sources in `weights` it is from.
    """
    times = np.zeros(len(rows), np.int64)
    for number, (source, weight) in enumerate(weights.items()):
        own = np.flatnonzero(source_of[rows] == number)
        times[own] = int(weight)
        times[own[seeded("weight", source).sample(range(len(own)), round(weight % 1 * len(own)))]] += 1
    return np.concatenate([rows[:0], *(rows[times > number] for number in range(times.max(initial=0)))])


def shuffled(items: Numbers, generator: random.Random) -> Numbers:
    """The items in a new order."""
    return items[generator.sample(range(len(items)), len(items))]
