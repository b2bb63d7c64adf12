"""Which rows make up which step."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest

from rlhf.engine.order import Order


def test_each_epoch_is_a_fresh_permutation() -> None:
    order = Order(rows=10, batch_size=4, seed=1)
    assert order.steps(2) == 5
    rows = [row for step in range(order.steps(2)) for row in order.batch(step)]
    epochs = rows[:10], rows[10:]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(10))


def test_the_order_is_a_function_of_seed_and_step() -> None:
    rows = {seed: [Order(10, 4, seed).batch(step) for step in range(5)] for seed in (1, 2)}
    assert rows[1] != rows[2]
    assert [Order(10, 4, 1).batch(step) for step in (4, 0, 2)] == [rows[1][step] for step in (4, 0, 2)]


def test_a_batch_larger_than_the_data_goes_through_several_epochs() -> None:
    assert Counter(Order(3, 7, 1).batch(0)) == Counter(dict.fromkeys(range(3), 2)) + Counter(Order(3, 7, 1).batch(0)[6:])
    assert Order(3, 7, 1).steps(1) == 1


LENGTHS_OF_ROWS = [random.Random(row).randrange(5, 300) for row in range(1003)]


def test_rows_of_similar_length_share_a_batch() -> None:
    def spreads(order: Order) -> list[int]:
        batches = [[LENGTHS_OF_ROWS[row] for row in order.batch(step)] for step in range(250)]
        return [max(batch) - min(batch) for batch in batches]

    plain, grouped = (Order(1003, 8, 1, lengths) for lengths in (None, LENGTHS_OF_ROWS))
    # 1003 rows are 125 batches and 3 rows: the batch that goes on into the next epoch is not sorted
    inside = [spread for step, spread in enumerate(spreads(grouped)) if step != 125]
    assert statistics.fmean(inside) < 15
    assert statistics.fmean(spreads(plain)) > 200
    # the batches do not come in order of length
    firsts = [LENGTHS_OF_ROWS[grouped.batch(step)[0]] for step in range(12)]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


@pytest.mark.parametrize("rows", [1, 7, 8, 24, 103])
def test_grouped_by_length_each_row_comes_once_an_epoch(rows: int) -> None:
    order = Order(rows, 8, 1, LENGTHS_OF_ROWS[:rows])
    stream = [row for step in range(2 * rows) for row in order.batch(step)]
    epochs = [stream[i : i + rows] for i in range(0, len(stream), rows)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(rows))] * 16


def test_grouped_by_length_each_epoch_has_other_batches() -> None:
    order = Order(104, 8, 1, LENGTHS_OF_ROWS[:104])
    epochs = [{frozenset(order.batch(step)) for step in range(first, first + 13)} for first in (0, 13, 26)]
    assert epochs[0].isdisjoint(epochs[1])
    assert epochs[1].isdisjoint(epochs[2])


def test_the_grouped_order_is_a_function_of_seed_and_step() -> None:
    def steps(seed: int, numbers: list[int]) -> list[list[int]]:
        order = Order(103, 8, seed, LENGTHS_OF_ROWS)
        return [order.batch(number) for number in numbers]

    assert steps(1, [30, 2, 14]) == [steps(1, list(range(31)))[number] for number in (30, 2, 14)]
    assert steps(1, [0, 1, 2]) != steps(2, [0, 1, 2])
