"""The gates of promotion: each compares one number with its bound in the params' section `promote`.

The numbers come from metrics/evaluate.json, and from the champion's answers beside this version's (rlhf/registry/comparison.py).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import Params
from rlhf.config.operations import Promote
from rlhf.errors import UserError

METRICS = Path("metrics/evaluate.json")
LEAST_SIDE = 0.05  # of the prompts, on which the new answer is as long or longer, and as long or shorter
LEAST_SHARE = 0.5  # of the prompts, which the champion must have room for: on fewer, the others may tell another story


@dataclass(frozen=True)
class Gate:
    """One gate: `text` says in words what was measured, the bound and the distance between them."""

    name: str
    value: float | None
    bound: float
    passed: bool
    text: str

    @property
    def line(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'} {self.name}: {self.text}"


def read_metrics(root: Path) -> dict[str, Any]:
    """The numbers of stage evaluate.

    Raises:
        UserError: the file is missing or not JSON.
    """
    path = root / METRICS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{METRICS}: no such file", remedy="run `dvc repro evaluate`, which writes it") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{METRICS}: not JSON ({error})", remedy="run `dvc repro --force --single-item evaluate`, which writes it anew"
        ) from None


@dataclass(frozen=True)
class Pair:
    """One held-out prompt: the judge's scores of this version's answer and of the champion's, and the reward model's (None after dpo)."""

    kind: str | None
    new: float
    champion: float
    new_reward: float | None
    champion_reward: float | None
    new_right: float | None = None  # share of the answers that are right; None where nothing tells
    champion_right: float | None = None


def check(metrics: Mapping[str, Any], params: Params, pairs: Sequence[Pair] | None) -> list[Gate]:
    """All gates: those that look at the version by itself, then those that compare it with the champion.

    Args:
        metrics: content of metrics/evaluate.json.
        params: its section promote has the bounds.
        pairs: both versions' answers to the same prompts; None: there is no champion to compare with.

    Raises:
        UserError: a number is missing in the metrics.
    """
    policy, promote = params.policy, params.promote
    gates = []
    if metrics.get("gold"):
        gates.append(
            _at_least(
                "min_gold_difference",
                f"gold score of {policy} − sft, lower end",
                _number(metrics, "gold.ci95.0"),
                promote.min_gold_difference,
            )
        )
    gates.append(_at_least("min_win_rate", "win rate against sft, lower end", _number(metrics, "win_rate.ci95.0"), promote.min_win_rate))
    if promote.min_length_controlled_win_rate is not None:
        gates.append(_at_equal_length(metrics, promote.min_length_controlled_win_rate))
    if params.reads_pairs:
        accuracy = _number(metrics, "reward_model.accuracy")
        gates.append(_at_least("min_reward_accuracy", "reward model's accuracy", accuracy, promote.min_reward_accuracy))
    gates += [
        _at_most("max_kl", "KL to sft per answer", _number(metrics, "kl"), promote.max_kl),
        _at_most(
            "max_perplexity_ratio", f"perplexity, {policy} over sft", _number(metrics, "perplexity.ratio"), promote.max_perplexity_ratio
        ),
        _at_least("min_eos_rate", "answers that end by themselves", _number(metrics, f"eos_rate.{policy}"), promote.min_eos_rate),
        _at_most("max_answer_tokens", "mean answer length", _number(metrics, f"answer_tokens.{policy}"), promote.max_answer_tokens),
    ]
    if metrics.get("accuracy"):
        gates += _accuracy(metrics, policy, promote)
    if params.trains_reward:
        rise, wins = _number(metrics, "reward_model.ci95.0"), _number(metrics, "win_rate.value")
        gates.append(_over_optimisation("over_optimisation", "sft", rise, wins))
        if metrics.get("accuracy"):
            gates.append(_fooled_by_accuracy(rise, _number(metrics, "accuracy.difference")))
    if pairs is not None:
        gates += against_champion(pairs, params, metrics.get("prompts"))
    return gates


def against_champion(pairs: Sequence[Pair], params: Params, asked: int | None = None) -> list[Gate]:
    """The gates that compare a version with the one in service, prompt by prompt.

    Args:
        pairs: the prompts that both have answered.
        params: with the bounds.
        asked: how many prompts this version was asked; the champion has no room for the others. None: as many as pairs.
    """
    asked = len(pairs) if asked is None else asked
    if len(pairs) < max(1, LEAST_SHARE * asked):
        text = f"the champion has room for {len(pairs)} of {asked} prompts and their answers only, too few to compare the two"
        return [Gate("min_champion_win_rate", None, params.promote.min_champion_win_rate, False, text)]
    samples, promote = params.evaluate.bootstrap_samples, params.promote
    win = wins(pairs)
    low, high = interval(win, samples)
    some = f", on the {len(pairs)} of {asked} prompts that it has room for" if len(pairs) < asked else ""
    what = f"win rate against the champion {win.mean():.4g} ({low:.4g} … {high:.4g}){some}, lower end"
    gates = [_at_least("min_champion_win_rate", what, low, promote.min_champion_win_rate)]
    kinds = sorted({pair.kind for pair in pairs if pair.kind is not None})
    by_kind = {kind: upper_end(wins([pair for pair in pairs if pair.kind == kind]), (0, 1), len(kinds)) for kind in kinds}
    if by_kind:
        what = "win rate against the champion by kind of task, upper end"
        gates.append(_every_kind("min_kind_win_rate", what, by_kind, promote.min_kind_win_rate))
    gates += _accuracy_against_champion(pairs, params)
    rewards = [(pair.new_reward, pair.champion_reward) for pair in pairs]
    rises = np.array([new - champion for new, champion in rewards if new is not None and champion is not None])
    if len(rises):
        gates.append(_over_optimisation("over_optimisation_champion", "the champion", interval(rises, samples)[0], float(win.mean())))
    return gates


def _at_equal_length(metrics: Mapping[str, Any], bound: float) -> Gate:
    name, what = "min_length_controlled_win_rate", "win rate against sft at equal length"
    sides = _number(metrics, "win_rate.length_controlled.both_sides")
    if sides < LEAST_SIDE:
        one_way = f"on {1 - sides:.1%} of the prompts the answers are all longer than sft's, or all shorter (at most {1 - LEAST_SIDE:.0%})"
        text = f"{what} cannot be told: {one_way}"
        return Gate(name, None, bound, False, text)
    return _at_least(name, f"{what}, lower end", _number(metrics, "win_rate.length_controlled.ci95.0"), bound)


def _accuracy(metrics: Mapping[str, Any], policy: str, promote: Promote) -> list[Gate]:
    """What reward functions say that tell right from wrong."""
    low = _number(metrics, f"accuracy.{policy}.ci95.0")
    rise = _number(metrics, "accuracy.ci95.0")
    return [
        _at_least("min_accuracy", "accuracy, lower end", low, promote.min_accuracy),
        _at_least("min_accuracy_difference", f"accuracy of {policy} − sft, lower end", rise, promote.min_accuracy_difference),
    ]


def _accuracy_against_champion(pairs: Sequence[Pair], params: Params) -> list[Gate]:
    known = [(pair.kind, pair.new_right, pair.champion_right) for pair in pairs]
    both = [(kind, new - champion) for kind, new, champion in known if new is not None and champion is not None]
    if not both:
        return []
    samples, promote = params.evaluate.bootstrap_samples, params.promote
    rises = np.array([rise for _, rise in both])
    low, high = interval(rises, samples)
    what = f"accuracy − the champion's {rises.mean():.4g} ({low:.4g} … {high:.4g}), lower end"
    gates = [_at_least("min_champion_accuracy_difference", what, low, promote.min_champion_accuracy_difference)]
    kinds = sorted({kind for kind, _ in both if kind is not None})
    if kinds:
        by_kind = {kind: upper_end(np.array([rise for of, rise in both if of == kind]), (-1, 1), len(kinds)) for kind in kinds}
        what = "accuracy − the champion's by kind of task, upper end"
        gates.append(_every_kind("min_kind_accuracy_difference", what, by_kind, promote.min_kind_accuracy_difference))
    return gates


def wins(pairs: Sequence[Pair]) -> np.ndarray:
    """For each prompt (N,): 1 where this version's answer scores higher than the champion's, 0 where lower, ½ for a tie."""
    return np.array([0.5 if pair.new == pair.champion else float(pair.new > pair.champion) for pair in pairs])


def interval(values: np.ndarray, samples: int) -> tuple[float, float]:
    """95% percentile interval of the mean of values (N,), resampled so many times (Efron 1979); always the same for the same values."""
    index = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    low, high = np.percentile(values[index].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def upper_end(values: np.ndarray, bounds: tuple[float, float], means: int) -> float:
    """Upper end of the 95% interval of the mean of values (N,), where so many means are looked at together (Bonferroni).

    After Agresti and Coull (1998, "Approximate is better than exact"): z²/2 values at each bound of what a value can be stand beside those
    that were found. A bootstrap of three equal values knows of no doubt, and one kind of task in a long tail of them has always lost.
    """
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / means)
    weights = np.array([*np.ones(len(values)), z * z / 2, z * z / 2])
    every = np.array([*values, *bounds])
    mean = np.average(every, weights=weights)
    spread = np.average((every - mean) ** 2, weights=weights)
    return float(mean + z * math.sqrt(spread / weights.sum()))


def _every_kind(name: str, what: str, upper_ends: Mapping[str, float], bound: float) -> Gate:
    worst, value = min(upper_ends.items(), key=lambda item: item[1])
    below = [f"{kind} {end:.4g}, short of {bound:g} by {bound - end:.4g}" for kind, end in upper_ends.items() if not end >= bound]
    text = f"{what}: " + ("; ".join(below) or f"{worst} {value:.4g} ≥ {bound:g}")
    return Gate(name, value, bound, not below, text)


def _over_optimisation(name: str, other: str, rise: float, win_rate: float) -> Gate:
    """The policy has learned to please the reward model and nobody else (arXiv 2210.10760)."""
    even = 0.5
    fooled = rise > 0 and not win_rate > even
    text = f"against {other}, reward model's score {rise:+.4g} (lower end), judge's win rate {win_rate:.4g}"
    ending = f": more reward, but short of a win rate above {even} by {even - win_rate:.4g}" if fooled else ""
    return Gate(name, win_rate, even, not fooled, text + ending)


def _fooled_by_accuracy(rise: float, difference: float) -> Gate:
    """As `_over_optimisation`, where right and wrong are told by a program."""
    fooled = rise > 0 and not difference > 0
    text = f"against sft, reward model's score {rise:+.4g} (lower end), accuracy {difference:+.4g}"
    ending = f": more reward, but short of an accuracy above sft's by {-difference:.4g}" if fooled else ""
    return Gate("over_optimisation_accuracy", difference, 0.0, not fooled, text + ending)


def _at_least(name: str, what: str, value: float, bound: float) -> Gate:
    passed = value >= bound
    return Gate(
        name,
        value,
        bound,
        passed,
        f"{what}: {value:.4g} ≥ {bound:g}" if passed else f"{what}: {value:.4g}, short of {bound:g} by {bound - value:.4g}",
    )


def _at_most(name: str, what: str, value: float, bound: float) -> Gate:
    passed = value <= bound
    return Gate(
        name,
        value,
        bound,
        passed,
        f"{what}: {value:.4g} ≤ {bound:g}" if passed else f"{what}: {value:.4g}, over {bound:g} by {value - bound:.4g}",
    )


def _number(metrics: Mapping[str, Any], path: str) -> float:
    found: Any = metrics
    try:
        for key in path.split("."):
            found = found[int(key) if isinstance(found, list) else key]
        return float(found)
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(
            f"{METRICS}: no number at {path}", remedy="run `dvc repro --force --single-item evaluate`, which writes it anew"
        ) from None
