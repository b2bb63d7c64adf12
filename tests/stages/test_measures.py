"""Calibration, length-controlled win rate, refusals and repetitions, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf.stages.measures import calibration, length_controlled, refuses, repeats, shares

ONCE = np.arange(8)[None]


def margin(chance: float) -> float:
    """By how much an answer scores higher that is better with this chance."""
    return math.log(chance / (1 - chance))


def test_calibration_is_the_distance_between_sure_and_right() -> None:
    # of four pairs that it is 75 % sure of, three are right: nothing to blame; of two that it is 95 % sure of, one is
    found = calibration([margin(0.75)] * 3 + [-margin(0.75)] + [margin(0.95), -margin(0.95)])
    assert found["pairs"] == {
        "70% to 80%": {"n": 4, "sure": pytest.approx(0.75), "right": 0.75},
        "90% to 100%": {"n": 2, "sure": pytest.approx(0.95), "right": 0.5},
    }
    assert found["error"] == pytest.approx(2 / 6 * 0.45)


def test_a_reward_model_that_knows_nothing_and_says_so_is_calibrated() -> None:
    assert calibration([1e-6, -1e-6]) == {
        "error": pytest.approx(0, abs=1e-5),
        "pairs": {"50% to 60%": {"n": 2, "sure": pytest.approx(0.5), "right": 0.5}},
    }
    assert calibration([1000.0])["error"] == 0  # no overflow, and the last bin is closed


def test_answers_of_one_length_keep_their_win_rate() -> None:
    found = length_controlled(np.array([1, 1, 1, 0, 1, 1, 1, 0.0]), np.zeros(8), ONCE)
    assert found["value"] == pytest.approx(0.75, abs=0.001)
    assert (found["of_length"], found["both_sides"]) == (0, 1)


def test_wins_that_length_alone_explains_count_for_nothing() -> None:
    # longer three times out of four; the longer one wins nine times out of ten: at equal length there is no telling
    wins = np.array([1] * 9 + [0] * 1 + [0] * 9 + [1] * 1 + ([1] * 9 + [0] * 1) * 2)
    longer = np.array([10] * 10 + [-10] * 10 + [10] * 20)
    found = length_controlled(wins, longer, np.arange(40)[None])
    assert wins.mean() == 0.7
    assert found["value"] == pytest.approx(0.5, abs=0.01)
    assert found["of_length"] > 1
    assert found["both_sides"] == 0.25
    # and the other way round: shorter answers that win are better than they look
    assert length_controlled(1 - wins, longer, np.arange(40)[None])["value"] == pytest.approx(0.5, abs=0.01)


def test_an_interval_of_the_resampled_prompts() -> None:
    draw = np.random.default_rng(1)
    wins, longer = (draw.random(300) < 0.7).astype(float), draw.normal(size=300)
    found = length_controlled(wins, longer, draw.integers(300, size=(500, 300)))
    low, high = found["ci95"]
    assert low < found["value"] < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 300), rel=0.25)
    one_sided = length_controlled(np.ones(50), longer[:50], draw.integers(50, size=(20, 50)))
    assert 0.98 < one_sided["value"] <= 1
    assert all(map(math.isfinite, one_sided["ci95"]))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I’m sorry, but that is not something I do.", True),
        ("As an AI, I have no opinion.", True),
        ("I CANNOT help with that.", True),
        ("Take the stairs. " * 10 + "I cannot say more.", False),
        ("You should say: sorry.", False),
        ("", False),
    ],
)
def test_an_answer_that_begins_by_refusing(answer: str, expected: bool) -> None:
    assert refuses(answer) is expected


def test_an_answer_that_says_the_same_again() -> None:
    assert repeats("the cat sat on the cat sat on the cat sat on")
    assert not repeats("the cat sat on the mat, and the dog lay by the fire")
    assert not repeats("")
    found = shares({"sft": ["I cannot.", "yes yes yes yes yes"], "ppo": ["a", "b"]})
    assert found == {"refusals": {"sft": 0.5, "ppo": 0}, "repetitions": {"sft": 0.5, "ppo": 0}}
