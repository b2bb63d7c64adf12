"""Which rows make up which step: a function of seed and step alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, eq=False)
class Order:
    """Which rows make up which step: each epoch a fresh permutation, the epochs one after the other.

    With `lengths` the rows of a batch are of similar length, but for a batch that lies across two epochs. A function of the step alone,
    so that a resumed run needs no state to find its place.
    """

    rows: int
    batch_size: int
    seed: int
    lengths: Sequence[int] | None = None  # of each row; None: any rows may meet in a batch

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.rows / self.batch_size))

    def batch(self, step: int) -> list[int]:
        """Row indices of step 0, 1, 2, …"""
        return self.following(step * self.batch_size, self.batch_size)

    def following(self, first: int, count: int) -> list[int]:
        """So many row indices from a place on, counted from 0 over all epochs."""
        return [_permutation(self, at // self.rows)[at % self.rows] for at in range(first, first + count)]


@lru_cache(maxsize=4)
def _permutation(order: Order, epoch: int) -> list[int]:
    generator = random.Random(f"{order.seed}/{epoch}")
    rows = list(range(order.rows))
    generator.shuffle(rows)
    return rows if order.lengths is None else _grouped(rows, order.lengths, order.batch_size, -epoch * order.rows, generator)


WINDOW = 32  # at most so many batches' worth of shuffled rows is sorted by length, and a quarter of an epoch: each epoch has new batches


def _grouped(rows: list[int], lengths: Sequence[int], size: int, boundary: int, generator: random.Random) -> list[int]:
    """Shuffled rows so ordered that the batches which lie in this epoch hold rows of similar length; the batches in random order.

    Args:
        boundary: a place where a batch begins, modulo `size`.
    """
    begin = min(boundary % size, len(rows))
    end = len(rows) - (len(rows) - begin) % size
    width = size * max(1, min(WINDOW, (end - begin) // size // 4))
    batches: list[list[int]] = []
    for start in range(begin, end, width):
        near = sorted(rows[start : min(start + width, end)], key=lengths.__getitem__)
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    generator.shuffle(batches)
    return [*rows[:begin], *(row for batch in batches for row in batch), *rows[end:]]
