"""Figures of the ratings: how many a day, which version wins how often, how far raters agree, and each rater's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import evalica
import numpy as np
from evalica import Winner
from sqlalchemy.orm import Session

from rlhf.config import Params
from rlhf.feedback.pairs import GIVEN
from rlhf.feedback.verdicts import Agreement, Judged, RaterFigures, agreement, held, judged, raters, waiting

RESAMPLES = 300
WINNERS = {"first": Winner.X, "second": Winner.Y, "tie": Winner.Draw, "both-bad": Winner.Draw}


@dataclass(frozen=True)
class VersionFigures:
    """A version against the others: how often it would win against one of them at random (Bradley-Terry), with a 95% interval."""

    version: str
    rate: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Figures:
    """All of them."""

    days: list[tuple[str, int]]  # UTC
    pairs: int  # rated
    complete: int  # by as many raters as feedback.ratings says
    waiting: int  # ratings of complete pairs that are no data yet
    decisions: dict[str, int]  # of the pairs
    versions: list[VersionFigures]
    agreement: Agreement | None
    raters: list[RaterFigures]

    @property
    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def figures(session: Session, params: Params) -> Figures:
    ratings = held(session)
    pairs = judged(ratings)
    complete = [pair for pair in pairs if len(pair.ratings) >= params.feedback.ratings]
    days = Counter(f"{rating.at:%Y-%m-%d}" for rating in ratings)
    decisions = Counter("one side" if (found := pair.decision[0]) in ("first", "second") else found for pair in pairs)
    return Figures(
        sorted(days.items()),
        len(pairs),
        len(complete),
        waiting(session, params.feedback.ratings),
        dict(sorted(decisions.items())),
        win_rates(pairs, params.seed),
        agreement(pairs, params.seed),
        raters(ratings),
    )


def win_rates(pairs: Sequence[Judged], seed: int) -> list[VersionFigures]:
    """Win rates of versions by Bradley-Terry, a tie being half a win for each; intervals by bootstrap over pairs.

    Each two versions that were compared count as having tied once more: the model knows no bounds for one that never lost.
    """
    compared = [pair for pair in pairs if pair.pair.first_version != pair.pair.second_version]
    compared = [pair for pair in compared if GIVEN not in (pair.pair.first_version, pair.pair.second_version)]
    if not compared:
        return []
    numbers: dict[tuple[str, str, Winner], int] = {}
    cells = []  # for each pair, outcomes by their number, and how often
    for pair in compared:
        one, other = pair.pair.first_version, pair.pair.second_version
        outcomes = Counter((one, other, WINNERS[verdict]) for verdict in pair.votes.elements())
        cells.append({numbers.setdefault(outcome, len(numbers)): count for outcome, count in outcomes.items()})
    table = np.zeros((len(cells), len(numbers)))
    for row, counts in enumerate(cells):
        table[row, list(counts)] = list(counts.values())
    outcomes_seen = list(numbers)
    versions = sorted({version for one, other, _ in outcomes_seen for version in (one, other)})
    rates = _rates(outcomes_seen, table.sum(axis=0), versions)
    generator = np.random.default_rng(seed)
    drawn = [generator.multinomial(len(cells), np.full(len(cells), 1 / len(cells))) @ table for _ in range(RESAMPLES)]
    low, high = np.percentile([_rates(outcomes_seen, weights, versions) for weights in drawn], [2.5, 97.5], axis=0)
    counted = _counted(outcomes_seen, table.sum(axis=0))
    found = [
        VersionFigures(version, rates[i], float(low[i]), float(high[i]), *(counted[version, what] for what in ("wins", "losses", "ties")))
        for i, version in enumerate(versions)
    ]
    return sorted(found, key=lambda one: -one.rate)


def _rates(outcomes: Sequence[tuple[str, str, Winner]], weights: np.ndarray, versions: Sequence[str]) -> list[float]:
    """For each version, the mean of its chances against each other one."""
    met = sorted({(min(one, other), max(one, other)) for one, other, _ in outcomes})
    rows = [*outcomes, *((one, other, Winner.Draw) for one, other in met)]
    xs, ys, winners = (list(column) for column in zip(*rows, strict=True))
    scores = evalica.bradley_terry(xs, ys, winners, weights=[*map(float, weights), *[1.0] * len(met)], limit=1000).scores
    found = [scores[version] for version in versions]
    return [float(np.mean([one / (one + other) for j, other in enumerate(found) if j != i])) for i, one in enumerate(found)]


def _counted(outcomes: Sequence[tuple[str, str, Winner]], weights: np.ndarray) -> Counter[tuple[str, str]]:
    counted: Counter[tuple[str, str]] = Counter()
    for (one, other, winner), weight in zip(outcomes, weights, strict=True):
        said = ("ties", "ties") if winner == Winner.Draw else ("wins", "losses") if winner == Winner.X else ("losses", "wins")
        for version, what in zip((one, other), said, strict=True):
            counted[version, what] += int(weight)
    return counted
