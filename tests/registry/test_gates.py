"""The gates of promotion, one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf import config
from rlhf.registry import gates
from rlhf.registry.remedies import remedy
from tests.registry.workspaces import PROJECT, changed


@pytest.fixture(scope="module")
def params() -> config.Params:
    shipped = config.load(PROJECT / "params.yaml")
    bounds = {"min_gold_difference": 0.1, "min_win_rate": 0.55, "min_reward_accuracy": 0.7, "max_kl": 40.0}
    return shipped.model_copy(update={"promote": shipped.promote.model_copy(update=bounds)})


@pytest.mark.parametrize(
    ("path", "value", "name", "distance"),
    [
        ("gold.ci95", [0.04, 0.2], "min_gold_difference", "short of 0.1 by 0.06"),
        ("win_rate.ci95", [0.5, 0.6], "min_win_rate", "short of 0.55 by 0.05"),
        ("reward_model.accuracy", 0.6, "min_reward_accuracy", "short of 0.7 by 0.1"),
        ("kl", 41.0, "max_kl", "over 40 by 1"),
        ("kl", float("nan"), "max_kl", "over 40 by nan"),
        ("perplexity.ratio", 1.25, "max_perplexity_ratio", "over 1.15 by 0.1"),
        ("eos_rate.ppo", 0.8, "min_eos_rate", "short of 0.9 by 0.1"),
        ("answer_tokens.ppo", 44.0, "max_answer_tokens", "over 40 by 4"),
    ],
)
def test_each_gate(params: config.Params, path: str, value: Any, name: str, distance: str) -> None:
    failed = [gate for gate in gates.check(changed(path, value), params, None) if not gate.passed]
    assert [gate.name for gate in failed] == [name]
    assert failed[0].text.endswith(distance)


def test_a_policy_that_wins_by_length_alone_can_be_refused(params: config.Params) -> None:
    shorter = changed("win_rate.length_controlled", {"value": 0.63, "ci95": [0.47, 0.76], "of_length": -2.2, "both_sides": 0.1})
    assert all(gate.passed for gate in gates.check(shorter, params, None))
    asked = params.model_copy(update={"promote": params.promote.model_copy(update={"min_length_controlled_win_rate": 0.5})})
    (failed,) = [gate for gate in gates.check(shorter, asked, None) if not gate.passed]
    assert failed.name == "min_length_controlled_win_rate"
    assert failed.text == "win rate against sft at equal length, lower end: 0.47, short of 0.5 by 0.03"
    assert "by the length of its answers" in remedy(failed.name, "ppo")
    # nothing was compared at equal length: what the regression says there is a guess
    guessed = {"value": 0.76, "ci95": [0.73, 0.81], "of_length": 0.9, "both_sides": 0.008}
    (failed,) = [gate for gate in gates.check(changed("win_rate.length_controlled", guessed), asked, None) if not gate.passed]
    assert failed.value is None
    assert "cannot be told: on 99.2% of the prompts the answers are all longer than sft's, or all shorter (at most 95%)" in failed.line


def beside(*kinds: str, wins: int, losses: int, ties: int, rise: float = 0.1) -> list[gates.Pair]:
    """So many prompts of each kind that this version's answer wins, loses or ties; the reward model prefers all of its answers."""
    scores = [(1.0, 0.0)] * wins + [(0.0, 1.0)] * losses + [(0.5, 0.5)] * ties
    return [gates.Pair(kind, new, champion, rise, 0.0) for kind in kinds for new, champion in scores]


def test_the_champion_is_to_be_beaten_beyond_chance(params: config.Params) -> None:
    def gate(pairs: list[gates.Pair]) -> gates.Gate:
        return next(gate for gate in gates.against_champion(pairs, params) if gate.name == "min_champion_win_rate")

    better = gate(beside("a", wins=80, losses=20, ties=100))
    assert better.passed
    # half of 200 prompts are ties: 0.65 ± 1.96 · √(0.0775 / 200), by hand
    assert better.value == pytest.approx(0.65 - 1.96 * (0.0775 / 200) ** 0.5, abs=0.01)
    luck = gate(beside("a", wins=55, losses=45, ties=0))
    assert not luck.passed
    assert luck.text.startswith("win rate against the champion 0.55 (0.4")
    assert luck.text.endswith(f"short of 0.5 by {0.5 - (luck.value or 0):.4g}")


def test_a_champion_without_room_for_all_prompts_is_compared_on_the_others(params: config.Params) -> None:
    pairs = beside("a", wins=80, losses=20, ties=0)
    most = gates.against_champion(pairs, params, 110)
    assert all(gate.passed for gate in most)
    assert most[0].text.startswith("win rate against the champion 0.8 (0.7")
    assert "), on the 100 of 110 prompts that it has room for, lower end: " in most[0].text
    assert "room for" not in gates.against_champion(pairs, params, 100)[0].text
    for some in (pairs, []):
        [few] = gates.against_champion(some, params, 201)
        assert (few.name, few.passed) == ("min_champion_win_rate", False)
        assert few.text.startswith(f"the champion has room for {len(some)} of 201 prompts")


def test_a_kind_of_task_that_became_worse_is_named(params: config.Params) -> None:
    pairs = beside("capital", wins=70, losses=10, ties=0) + beside("colour", wins=10, losses=30, ties=0)
    failed = [gate for gate in gates.against_champion(pairs, params) if not gate.passed]
    assert [gate.name for gate in failed] == ["min_kind_win_rate"]
    assert "colour 0." in failed[0].text
    assert "short of 0.45 by 0." in failed[0].text
    assert "capital" not in failed[0].text
    # with few prompts, the same share may be chance
    few = beside("capital", wins=70, losses=10, ties=0) + beside("colour", wins=1, losses=3, ties=0)
    assert all(gate.passed for gate in gates.against_champion(few, params))
    # nor do kinds with two or three prompts refuse a version, however many of them it loses
    tail = [pair for number in range(30) for pair in beside(f"rare {number}", wins=0, losses=1 + number % 3, ties=0)]
    [gate] = [gate for gate in gates.against_champion(pairs[:80] + tail, params) if gate.name == "min_kind_win_rate"]
    assert gate.passed
    # rows without a kind are not divided
    unkind = [replace(pair, kind=None) for pair in pairs]
    assert "min_kind_win_rate" not in {gate.name for gate in gates.against_champion(unkind, params)}


def test_the_upper_end_of_a_few_values_knows_of_doubt() -> None:
    # one mean of 16 of 20: (16 + z²/2) / (20 + z²) ± z √(p (1 − p) / (20 + z²)), z = 1.959964 (Agresti and Coull 1998)
    wide = 20 + 3.841459
    p = (16 + 3.841459 / 2) / wide
    assert gates.upper_end(np.array([1.0] * 16 + [0.0] * 4), (0, 1), 1) == pytest.approx(p + 1.959964 * math.sqrt(p * (1 - p) / wide))
    # five of five lost are chance (1 in 32), six are not (1 in 64)
    assert [gates.upper_end(np.zeros(n), (0, 1), 1) < 0.45 for n in (1, 5, 6)] == [False, False, True]
    assert [gates.upper_end(-np.ones(n), (-1, 1), 1) < -0.05 for n in (1, 4, 6)] == [False, False, True]
    # of thirty kinds, one will lose six
    assert gates.upper_end(np.zeros(6), (0, 1), 30) > 0.45
    # of many, the bootstrap says the same
    draw = np.random.default_rng(1)
    rises = draw.choice([-1.0, 0.0, 1.0], 2000, p=[0.1, 0.85, 0.05])
    assert gates.upper_end(rises, (-1, 1), 1) == pytest.approx(gates.interval(rises, 2000)[1], abs=0.002)


def test_more_reward_and_no_better_answers_is_refused(params: config.Params) -> None:
    loose = params.model_copy(update={"promote": params.promote.model_copy(update={"min_champion_win_rate": 0.3})})

    def failed(pairs: list[gates.Pair]) -> list[str]:
        return [gate.name for gate in gates.against_champion(pairs, loose) if not gate.passed]

    assert failed(beside("a", wins=48, losses=52, ties=0)) == ["over_optimisation_champion"]
    assert failed(beside("a", wins=48, losses=52, ties=0, rise=-0.1)) == []
    assert failed(beside("a", wins=60, losses=40, ties=0)) == []
    against_sft = changed("win_rate", {"value": 0.5, "ci95": [0.6, 0.7]})
    assert [gate.name for gate in gates.check(against_sft, params, None) if not gate.passed] == ["over_optimisation"]
    fallen = gates.check(changed("reward_model.ci95", [-1.6, 0.1]), params, None)[-1]
    assert fallen.text == "against sft, reward model's score -1.6 (lower end), judge's win rate 0.8"
    # dpo has no reward model
    no_rewards = [replace(pair, new_reward=None, champion_reward=None) for pair in beside("a", wins=60, losses=40, ties=0)]
    assert "over_optimisation_champion" not in {gate.name for gate in gates.against_champion(no_rewards, params)}


def test_without_gold_score_the_win_rate_decides(params: config.Params) -> None:
    names = [gate.name for gate in gates.check(changed("gold", None), params, None)]
    assert "min_gold_difference" not in names
    assert "min_win_rate" in names


# ----------------------------------------------------------------------------------------------------------- right and wrong

ACCURACY = {
    "ppo": {"value": 0.6, "ci95": [0.5, 0.7]},
    "sft": {"value": 0.4, "ci95": [0.3, 0.5]},
    "difference": 0.2,
    "ci95": [0.1, 0.3],
}


@pytest.mark.parametrize(
    ("change", "bounds", "name", "distance"),
    [
        ({}, {"min_accuracy": 0.55}, "min_accuracy", "accuracy, lower end: 0.5, short of 0.55 by 0.05"),
        ({"ci95": [-0.1, 0.3]}, {}, "min_accuracy_difference", "accuracy of ppo − sft, lower end: -0.1, short of 0 by 0.1"),
        ({"difference": -0.1}, {}, "over_optimisation_accuracy", "more reward, but short of an accuracy above sft's by 0.1"),
    ],
)
def test_each_gate_of_accuracy(params: config.Params, change: dict[str, Any], bounds: dict[str, float], name: str, distance: str) -> None:
    given = params.model_copy(update={"promote": params.promote.model_copy(update=bounds)})
    passed = gates.check(changed("accuracy", ACCURACY), params, None)
    assert all(gate.passed for gate in passed)
    assert {"min_accuracy", "min_accuracy_difference"} <= {gate.name for gate in passed}
    failed = [gate for gate in gates.check(changed("accuracy", ACCURACY | change), given, None) if not gate.passed]
    assert [gate.name for gate in failed] == [name]
    assert failed[0].text.endswith(distance)


def test_accuracy_against_the_champion_and_by_kind(params: config.Params) -> None:
    def failed(good: float, bad: float) -> dict[str, str]:
        pairs = [replace(pair, new_right=good, champion_right=0.5) for pair in beside("sums", wins=90, losses=10, ties=0)]
        pairs += [replace(pair, new_right=bad, champion_right=0.5) for pair in beside("facts", wins=60, losses=10, ties=0)]
        return {gate.name: gate.text for gate in gates.against_champion(pairs, params) if not gate.passed}

    assert failed(0.75, 0.75) == {}
    worse_in_one = failed(0.75, 0.25)
    assert worse_in_one.keys() == {"min_kind_accuracy_difference"}
    # 70 times −0.25, z = 2.2414 of two kinds: −17.5 / 75.02 + z √(0.0709 / 75.02), by hand
    assert worse_in_one["min_kind_accuracy_difference"].endswith("upper end: facts -0.1644, short of -0.05 by 0.1144")
    assert failed(0.25, 0.75)["min_champion_accuracy_difference"].startswith("accuracy − the champion's -0.0")
    unchecked = [gate.name for gate in gates.against_champion(beside("a", wins=60, losses=10, ties=0), params)]
    assert "min_champion_accuracy_difference" not in unchecked
