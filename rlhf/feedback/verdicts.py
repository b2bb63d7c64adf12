"""What several raters' choices say together: of each pair, and of the raters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import krippendorff
import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session, joinedload

from rlhf.feedback.tables import TAKING, Pair, Rating

# as krippendorff counts them: that neither is better is one value, for whatever reason
VALUES = {"first": 0, "second": 1, "tie": 2, "both-bad": 2}
RESAMPLES = 300


@dataclass
class Judged:
    """A pair with the ratings that hold, skips left out; one of each rater."""

    pair: Pair
    ratings: list[Rating] = field(default_factory=list)

    @property
    def votes(self) -> Counter[str]:
        return Counter(rating.verdict for rating in self.ratings)

    @property
    def decision(self) -> tuple[str, float]:
        return decided(self.votes)


def decided(votes: Counter[str]) -> tuple[str, float]:
    """The verdict of more than half of the votes and their share; `undecided` where there is none."""
    verdict, count = votes.most_common(1)[0]
    share = count / votes.total()
    return (verdict, share) if share > 0.5 else ("undecided", share)


def held(session: Session, *, lock: bool = False) -> list[Rating]:
    """All ratings that hold, oldest first, skips and hidden ones among them.

    Args:
        lock: none of them is undone before the session has ended, which must be one that writes.
    """
    query = select(Rating).where(Rating.revoked.is_(None)).options(joinedload(Rating.pair)).order_by(Rating.id)
    return list(session.scalars(query.with_for_update(of=Rating) if lock else query))


def judged(ratings: Iterable[Rating]) -> list[Judged]:
    """The pairs that were rated, but for gold pairs and repeats."""
    found: dict[int, Judged] = {}
    for rating in ratings:
        if rating.choice != "skip" and rating.pair.gold is None and rating.pair.repeat_of is None:
            found.setdefault(rating.pair_id, Judged(rating.pair)).ratings.append(rating)
    return list(found.values())


def waiting(session: Session, least: int) -> int:
    """Ratings of pairs that have enough of them, and that are no data yet."""
    counting = Rating.revoked.is_(None) & (Rating.choice != "skip")
    counts = select(Rating.pair_id).where(counting).group_by(Rating.pair_id).having(func.count() >= least)
    new = Rating.ingested.is_(None) | (Rating.ingested == TAKING)
    query = select(func.count()).select_from(Rating).join(Pair).where(counting, new, Rating.pair_id.in_(counts))
    return session.scalar(query.where(Pair.gold.is_(None), Pair.repeat_of.is_(None))) or 0


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha of nominal values, with a 95% interval by bootstrap over pairs."""

    alpha: float
    low: float
    high: float
    pairs: int  # that two raters at least have rated


def agreement(pairs: Sequence[Judged], seed: int) -> Agreement | None:
    """How far raters agree; None where no two rated the same pair, or all said the same of every pair."""
    counts = np.array([_counted(pair) for pair in pairs if len(pair.ratings) > 1])
    alpha = _alpha(counts)
    if alpha is None:
        return None
    generator = np.random.default_rng(seed)
    drawn = (counts[generator.integers(len(counts), size=len(counts))] for _ in range(RESAMPLES))
    found = [value for value in map(_alpha, drawn) if value is not None]
    low, high = np.percentile(found or [alpha], [2.5, 97.5])
    return Agreement(alpha, float(low), float(high), len(counts))


def _counted(pair: Judged) -> list[int]:
    counts = [0, 0, 0]
    for rating in pair.ratings:
        counts[VALUES[rating.verdict]] += 1
    return counts


def _alpha(counts: np.ndarray) -> float | None:
    # of one value alone there is nothing to agree on by chance
    if len(counts) == 0 or (counts.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    part: int
    of: int


@dataclass(frozen=True)
class RaterFigures:
    """What is known of a rater."""

    name: str
    ratings: int
    skipped: int
    seconds: float | None  # at the median
    gold: Share  # of the gold pairs they rated: as is known to be right
    repeats: Share  # of those shown twice: judged the same again
    left: Share  # of their choices for a side: the one on the left


def raters(ratings: Sequence[Rating]) -> list[RaterFigures]:
    """Each rater's own figures."""
    return [_rater(name, [one for one in ratings if one.rater == name]) for name in sorted({rating.rater for rating in ratings})]


def _rater(name: str, own: Sequence[Rating]) -> RaterFigures:
    given = [rating for rating in own if rating.choice != "skip"]
    verdicts = {rating.pair_id: rating.verdict for rating in given}
    gold = [rating.verdict == rating.pair.gold for rating in given if rating.pair.gold is not None]
    repeats = [rating.verdict == verdicts[of] for rating in given if (of := rating.pair.repeat_of) is not None and of in verdicts]
    sides = [rating.choice == "a" for rating in given if rating.choice in ("a", "b")]
    seconds = [rating.seconds for rating in given if rating.seconds is not None]
    return RaterFigures(
        name,
        len(given),
        len(own) - len(given),
        float(np.median(seconds)) if seconds else None,
        *(Share(sum(found), len(found)) for found in (gold, repeats, sides)),
    )
