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


def test_a_gain_is_told_in_standard_deviations_of_the_noise() -> None:
    # differences 2 and 2: √(4 / 2); 2 and −1.5: √(3.125 / 2)
    assert normalised(5.0, [1.0, 3.0]) == pytest.approx(3 / math.sqrt(2))
    assert normalised(1.5, [1.0, 3.0]) == pytest.approx(-0.5 / 1.25)
    assert [normalised(9.0, before) for before in ([], [1.0])] == [0, 0]
    assert normalised(2.0, [2.0, 2.0]) == 0
    # a leap counts as noise as well, as one of so many differences
    assert [normalised(signal, [1.0, 1.1] * 10) for signal in (1e9, -1e9)] == [3, -3]


def test_of_two_steady_rises_the_faster_one_gains_more() -> None:
    noise = [0.1, -0.1] * 5 + [0.0]

    def gain(rise: float) -> float:
        signals = [rise * step + one for step, one in enumerate(noise)]
        return normalised(signals[-1], signals[:-1])

    # in standard deviations of the ten signals, the rise among them, it would be 1.7 times as much, and never above 1.9
    assert gain(0.06) > 2.5 * gain(0.02)


def test_a_cluster_that_was_left_with_a_bad_value_is_chosen_again() -> None:
    level = Level.of(2)
    level.credit(0, -2.0, window=10)
    waited = 1
    while level.choose(3.0) == 1:
        level.credit(1, 0.0, window=10)
        waited += 1
    assert waited == 12


def test_an_arm_is_credited_with_the_rollout_after_its_update() -> None:
    bandit = Bandit.of({"b": 2, "a": 2}, window=10, exploration=1.0)
    assert bandit.names == ["a", "b"]
    for signal in (1.0, 3.0):
        bandit.credit(signal)  # before the first choice nobody is credited
    assert (bandit.clusters.total, bandit.current) == (1, [0, 0])
    bandit.choose()
    assert (bandit.last, bandit.current) == ((0, 0), [0, 0])  # the values that the run begins with
    bandit.credit(2.5)
    # differences 2 and −0.5: 0.5 / √(4.25 / 4), to cluster a and its first value
    gain = pytest.approx(0.5 / math.sqrt(4.25 / 4))
    assert (bandit.clusters.gains, bandit.values[0].gains, bandit.values[1].gains) == ([[gain], []], [[gain], []], [[], []])
    bandit.choose()  # 0.485 + √(ln 2 / 2) = 1.074 against √ln 2 = 0.833, on both levels
    assert bandit.last == (0, 0)
    bandit.credit(0.5)
    # before it 1, 3 and 2.5: mean 13/6, differences 2, −0.5 and −2; the mean of both gains is −0.468
    assert bandit.clusters.gains[0] == [gain, pytest.approx((0.5 - 13 / 6) / math.sqrt(8.25 / 6))]
    bandit.choose()  # −0.468 + √(ln 3 / 3) against √ln 3
    assert (bandit.last, bandit.current) == ((1, 0), [0, 0])


def test_what_json_kept_goes_on_as_it_would_have() -> None:
    generator = random.Random(1)
    bandit = Bandit.of({"a": 3, "b": 2, "c": 4}, window=3, exploration=3.0)
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
