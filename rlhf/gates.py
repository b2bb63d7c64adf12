"""The gates of promotion: each compares one number of metrics/evaluate.json with its bound in the params' section `promote`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.operations import Promote
from rlhf.errors import UserError

METRICS = Path("metrics/evaluate.json")


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


def score(metrics: Mapping[str, Any], policy: str) -> tuple[str, float]:
    """What versions are compared by: the gold score of the policy, or the win rate where there is none."""
    key = f"gold.{policy}" if metrics.get("gold") else "win_rate.value"
    return key, _number(metrics, key)


def check(metrics: Mapping[str, Any], policy: str, promote: Promote, champion: Mapping[str, str] | None) -> list[Gate]:
    """All gates, on the metrics of one version.

    Args:
        metrics: content of metrics/evaluate.json.
        policy: its name for the new policy: ppo or dpo.
        promote: the bounds.
        champion: tags of the version in service; None: there is none.

    Raises:
        UserError: a number is missing in the metrics.
    """
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
    gates += [
        _at_least("min_win_rate", "win rate against sft, lower end", _number(metrics, "win_rate.ci95.0"), promote.min_win_rate),
        _at_least("min_reward_accuracy", "reward model's accuracy", _number(metrics, "reward_model.accuracy"), promote.min_reward_accuracy),
        _at_most("max_kl", "KL to sft per answer", _number(metrics, "kl"), promote.max_kl),
        _at_most(
            "max_perplexity_ratio", f"perplexity, {policy} over sft", _number(metrics, "perplexity.ratio"), promote.max_perplexity_ratio
        ),
        _at_least("min_eos_rate", "answers that end by themselves", _number(metrics, f"eos_rate.{policy}"), promote.min_eos_rate),
        _at_most("max_answer_tokens", "mean answer length", _number(metrics, f"answer_tokens.{policy}"), promote.max_answer_tokens),
    ]
    return [*gates, _regression(metrics, policy, promote.max_regression, champion)]


def _regression(metrics: Mapping[str, Any], policy: str, allowed: float, champion: Mapping[str, str] | None) -> Gate:
    key, own = score(metrics, policy)
    name = "max_regression"
    if champion is None:
        return Gate(name, None, allowed, True, "no champion to compare with")
    # the champion may be another algorithm's
    theirs = f"evaluate.gold.{champion.get('algorithm')}" if metrics.get("gold") else f"evaluate.{key}"
    if champion.get("evaluate.heldout") != str(metrics.get("heldout")) or theirs not in champion:
        return Gate(name, None, allowed, True, "not comparable: the champion was evaluated on another held-out set")
    return _at_most(name, f"{key} of the champion − of this version", float(champion[theirs]) - own, allowed)


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
