"""What stage evaluate reports beside the plain means: calibration, a win rate without length's part, refusals and repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.rewards.penalties import repetition

BINS = (0.5, 0.6, 0.7, 0.8, 0.9)  # where they begin: how sure a reward model is of a pair is one half at least
RIDGE = 0.001  # so that there is an end to the fit where one side always wins
STEPS, LARGEST = 25, 2.0  # of Newton's method, and of one of its steps
REFUSALS = (
    "as an ai",
    "i am not able to",
    "i am unable",
    "i apologize, but",
    "i can't",
    "i cannot",
    "i do not feel comfortable",
    "i don't feel comfortable",
    "i won't",
    "i will not",
    "i'm not able to",
    "i'm sorry, but",
    "i'm unable",
    "i am sorry, but",
)
REFUSED_WITHIN = 100  # characters
REPEATED = 1 / 3  # of an answer's runs of three words


# --------------------------------------------------------------------------------------------------------- reward models


def calibration(margins: Sequence[float]) -> dict[str, Any]:
    """How far a reward model's word can be taken: for pairs of which it is about as sure, how sure it is and how often it is right.

    It holds that the chosen answer is the better one with the chance 1 / (1 + exp(−margin)), which its loss makes it learn. `error` is the
    mean distance of the two over all pairs (expected calibration error, arXiv 1706.04599).

    Args:
        margins: of each pair, by how much the chosen answer scores higher.
    """
    values = np.array(margins)
    sure = 1 / (1 + np.exp(-np.abs(values)))
    of_bin = np.searchsorted(BINS, sure, side="right") - 1
    table: dict[str, dict[str, float]] = {}
    for number, begin in enumerate(BINS):
        if (inside := of_bin == number).any():
            name = f"{begin:.0%} to {begin + 0.1:.0%}"
            table[name] = {"n": int(inside.sum()), "sure": float(sure[inside].mean()), "right": float((values[inside] > 0).mean())}
    error = sum(row["n"] * abs(row["sure"] - row["right"]) for row in table.values()) / len(values)
    return {"error": error, "pairs": table}


# -------------------------------------------------------------------------------------------------------------- win rate


def length_controlled(wins: np.ndarray, lengths: np.ndarray, index: np.ndarray) -> dict[str, Any]:
    """The win rate that would be if answers were as long as those they are held against (after arXiv 2404.04475).

    A logistic regression of the wins, with a constant and with tanh(difference of the lengths ÷ its standard deviation); the win rate is
    what it says where there is no difference. `both_sides` is the share of the prompts on the smaller side of that point, those on it
    counted: where it is next to nothing, no answers of one length were compared, and the number is a guess.

    Args:
        wins: of each prompt (N,): 1, ½ or 0.
        lengths: of each prompt (N,): by how much the new answer is longer, in tokens.
        index: rows of resampled prompts (S, N), for the 95% interval.
    """
    spread = lengths.std()
    terms = np.tanh(lengths / spread) if spread else np.zeros(len(lengths))
    (constant,), (slope,) = fitted(wins[None], terms[None])
    bounds = np.percentile(_chance(fitted(wins[index], terms[index])[0]), [2.5, 97.5])
    sides = min((lengths >= 0).mean(), (lengths <= 0).mean())
    found = {"value": float(_chance(constant)), "ci95": [float(bound) for bound in bounds], "of_length": float(slope)}
    return found | {"both_sides": float(sides)}


def fitted(wins: np.ndarray, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Constant and slope of a logistic regression of each row, by Newton's method.

    Args:
        wins: (S, N).
        terms: (S, N).
    """
    constant, slope = np.zeros(len(wins)), np.zeros(len(wins))
    for _ in range(STEPS):
        chance = _chance(constant[:, None] + slope[:, None] * terms)
        rest, weight = wins - chance, chance * (1 - chance)
        first, second = rest.sum(1) - RIDGE * constant, (rest * terms).sum(1) - RIDGE * slope
        a, b, c = weight.sum(1) + RIDGE, (weight * terms).sum(1), (weight * terms**2).sum(1) + RIDGE
        determinant = a * c - b * b
        constant = constant + np.clip((c * first - b * second) / determinant, -LARGEST, LARGEST)
        slope = slope + np.clip((a * second - b * first) / determinant, -LARGEST, LARGEST)
    return constant, slope


def _chance(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))


# --------------------------------------------------------------------------------------------------------------- answers


def refuses(answer: str) -> bool:
    """Whether an answer says in its first 100 characters that it will not answer, by one of REFUSALS."""
    begin = answer[:REFUSED_WITHIN].lower().replace("’", "'")
    return any(phrase in begin for phrase in REFUSALS)


def repeats(answer: str) -> bool:
    """Whether more than a third of an answer's runs of three words stood in it before."""
    return -repetition(answer) > REPEATED


def shares(answers: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """By policy, the share of the answers that refuse, and that repeat themselves."""
    return {
        "refusals": {name: statistics.fmean(map(refuses, said)) for name, said in answers.items()},
        "repetitions": {name: statistics.fmean(map(repeats, said)) for name, said in answers.items()},
    }
