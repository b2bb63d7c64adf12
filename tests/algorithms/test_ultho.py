"""The bandit of two levels against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import random

import pytest

from rlhf.algorithms.ultho import Bandit, Level, normalised


def test_a_level_chooses_the_highest_upper_bound() -> None:
    level = Level.of(3)
    assert level.choose(1.0) == 0  # ln 1 is 0: all bounds are
    level.credit(0, -1.0, window=2)
    # U: −1 + √(ln 2 / 2) for the first, √ln 2 for the others, of which the first is taken
    assert level.choose(1.0) == 1
    level.credit(1, 0.1, window=2)
    # ln 3 = 1.099: 0.1 + √(1.099 / 2) = 0.841 against √1.099 = 1.048
    assert level.choose(1.0) == 2
    assert level.choose(0.0) == 1  # Q alone: −1, 0.1, 0
    # 1.4 + √(1.386 / 3) = 2.08 against √1.386 = 1.177
    for gain in (1.3, 1.5):
        level.credit(1, gain, window=2)
    assert level.quality(1) == pytest.approx(1.4)  # of the last two
    assert level.choose(1.0) == 1
    assert (level.chosen, level.total) == ([2, 4, 1], 5)


def test_a_gain_is_told_in_standard_deviations_of_what_came_before() -> None:
    assert normalised(5.0, [1.0, 3.0]) == pytest.approx(3.0)
    assert normalised(1.5, [1.0, 3.0]) == pytest.approx(-0.5)
    assert [normalised(9.0, before) for before in ([], [1.0], [2.0, 2.0])] == [0, 0, 0]
    assert [normalised(signal, [1.0, 3.0]) for signal in (1e9, -1e9)] == [3, -3]


def test_an_arm_is_credited_with_the_rollout_after_its_update() -> None:
    bandit = Bandit.of({"b": 2, "a": 2}, window=10, exploration=1.0)
    assert bandit.names == ["a", "b"]
    for signal in (1.0, 3.0):
        bandit.credit(signal)  # before the first choice nobody is credited
    assert (bandit.clusters.total, bandit.current) == (1, [0, 0])
    bandit.choose()
    assert (bandit.last, bandit.current) == ((0, 0), [0, 0])  # the values that the run begins with
    bandit.credit(2.5)
    # (2.5 − 2) / 1, to cluster a and its first value
    assert (bandit.clusters.gains, bandit.values[0].gains, bandit.values[1].gains) == ([[0.5], []], [[0.5], []], [[], []])
    bandit.choose()  # 0.5 + √(ln 2 / 2) = 1.089 against √ln 2 = 0.833, on both levels
    assert bandit.last == (0, 0)
    bandit.credit(0.5)
    # before it 1, 3 and 2.5: mean 13/6, spread √(13/18); the mean of both gains is −0.731
    assert bandit.clusters.gains[0] == pytest.approx([0.5, (0.5 - 13 / 6) / math.sqrt(13 / 18)])
    bandit.choose()  # −0.731 + √(ln 3 / 3) against √ln 3
    assert (bandit.last, bandit.current) == ((1, 0), [0, 0])


def test_what_json_kept_goes_on_as_it_would_have() -> None:
    generator = random.Random(1)
    bandit = Bandit.of({"a": 3, "b": 2, "c": 4}, window=3, exploration=0.5)
    for step in range(200):
        bandit.credit(generator.random())
        if step % 7 == 0:
            other = Bandit.restored(json.loads(json.dumps(bandit.state())))
            assert other == bandit
            bandit = other
        bandit.choose()
    assert min(bandit.clusters.chosen) > 20
    assert all(min(level.chosen) > 2 for level in bandit.values)
    assert all(len(gains) <= 3 for level in bandit.values for gains in level.gains)


def test_the_arm_that_brings_more_is_chosen_more() -> None:
    generator = random.Random(1)
    bandit = Bandit.of({"rate": 3}, window=10, exploration=1.0)
    level = 0.0
    for _ in range(300):
        bandit.credit(level + generator.gauss(0, 0.3))
        bandit.choose()
        level = 0.5 * level + (0.0, 1.0, 0.3)[bandit.current[0]]
    first, best, third = bandit.values[0].chosen
    assert best > first + third
