"""What a rater is shown next, and what becomes of what they press.

Nothing is stored of a pair that is only shown: order and token follow from (seed, pair, rater), so that a page that is opened again shows
the same form, and one that is sent again is the rating that is there.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, exists, func, select
from sqlalchemy.orm import Session, aliased

from rlhf.config import Params
from rlhf.feedback.tables import Choice, Pair, Rating, held, now

HELD = Rating.revoked.is_(None)
LOOKED_AT = 200  # pairs that one is drawn from
REPEAT_AFTER = 5  # ratings: before that, one would remember


class StaleError(Exception):
    """A form that does not fit what the record holds; the message says how."""


@dataclass(frozen=True)
class Shown:
    """A pair as a rater sees it."""

    pair: Pair
    swapped: bool
    token: str

    @property
    def texts(self) -> tuple[str, str]:
        """Answers A and B."""
        first, second = self.pair.first_text, self.pair.second_text
        return (second, first) if self.swapped else (first, second)


@dataclass(frozen=True)
class Given:
    """What a rater sends."""

    token: str
    pair: int
    choice: Choice
    reason: str | None = None
    edit: str | None = None
    seconds: float | None = None


class Rater:
    """One who rates, in a session that writes.

    Args:
        session: of the record.
        params: of the workspace.
        name: of the rater.
    """

    def __init__(self, session: Session, params: Params, name: str) -> None:
        self.session, self._settings, self._seed, self.name = session, params.feedback, params.seed, name

    @property
    def done(self) -> int:
        return self._count(select(Rating.id).where(HELD, Rating.rater == self.name))

    @property
    def left(self) -> int:
        """Pairs that wait for them, but for what is hidden among them."""
        return self._count(self._open())

    @property
    def last(self) -> Rating | None:
        """The rating that an undo takes back: the last one that holds, unless it is data already."""
        query = select(Rating).where(HELD, Rating.rater == self.name).order_by(Rating.id.desc()).limit(1)
        found = self.session.scalar(query)
        return found if found and found.ingested is None else None

    def next(self) -> Shown | None:
        """What comes next: the same until it is rated, unless others' ratings complete it meanwhile."""
        waiting = self.session.execute(self._open().limit(LOOKED_AT)).all()
        if not waiting:
            return None
        done = self.done
        draw = random.Random(f"{self._seed}/{self.name}/{done}").random()
        hidden: Sequence[Pair] = ()
        if draw < self._settings.gold_share:
            hidden = self.session.scalars(select(Pair).where(Pair.gold.is_not(None), ~self._rated()).limit(LOOKED_AT)).all()
        elif draw < self._settings.gold_share + self._settings.repeat_share:
            hidden = self._repeats()
        # those that others have begun are complete soonest
        fullest = [pair for pair, count in waiting if count == waiting[0][1]]
        return self.shown(min(hidden or fullest, key=lambda pair: self._hash(pair.name)))

    def shown(self, pair: Pair) -> Shown:
        """A pair in the order that is drawn for this rater; a repeat has the sides exchanged."""
        swapped = self._swapped(pair.name)
        if pair.repeat_of is not None:
            before = select(Rating.swapped).where(HELD, Rating.pair_id == pair.repeat_of, Rating.rater == self.name)
            swapped = not (self.session.scalar(before) or False)
        attempt = self._count(select(Rating.id).where(~HELD, Rating.pair_id == pair.id, Rating.rater == self.name))
        # of the name: the number of a pair that was forgotten is given again, and a form of that one must not fit the new one
        return Shown(pair, swapped, self._hash(pair.name, "token", attempt))

    def rate(self, given: Given) -> None:
        """Take a rating; the same one again changes nothing.

        Raises:
            StaleError: the form is of another state of the record, or was sent before with another choice.
        """
        before = self.session.scalar(select(Rating).where(Rating.token == given.token))
        if before is not None:
            if (before.rater, before.choice, before.edit) != (self.name, given.choice, held(given.edit)):
                raise StaleError("this form was sent before, with another choice, which holds: undo it first")
            return
        pair = self.session.get(Pair, given.pair)
        if pair is None:
            raise StaleError("this pair is not there any more")
        shown = self.shown(pair)
        if shown.token != given.token or self.session.scalar(select(self._rated(pair.id))):
            raise StaleError("this form was not made for this rater and pair as they stand")
        self.session.add(
            Rating(
                token=given.token,
                pair_id=pair.id,
                rater=self.name,
                swapped=shown.swapped,
                choice=given.choice,
                reason=given.reason,
                edit=given.edit,
                seconds=given.seconds,
            )
        )
        self.session.flush()

    def undo(self, token: str) -> Pair | None:
        """Take back the last rating, and its pair is to be rated again; a second time for the same one changes nothing.

        Raises:
            StaleError: it is not the last one, or is data already.
        """
        # an ingest that looks at it at this moment is waited for: it may take it
        rating = self.session.scalar(select(Rating).where(Rating.token == token, Rating.rater == self.name).with_for_update())
        if rating is None:
            raise StaleError("there is no such rating")
        if rating.revoked is None:
            if self.last is not rating:
                raise StaleError("only the last rating can be undone, and only until it has been ingested")
            rating.revoked = now()
            self.session.flush()
        return rating.pair if not self.session.scalar(select(self._rated(rating.pair_id))) else None

    # ------------------------------------------------------------------------------------------------------ inside

    def _open(self) -> Select[tuple[Pair, int]]:
        """Pairs that lack ratings and that they have not seen, those with most of them first."""
        query = select(Rating.pair_id, func.count().label("n")).where(HELD, Rating.choice != "skip").group_by(Rating.pair_id)
        counts = query.subquery()
        count = func.coalesce(counts.c.n, 0)
        joined = select(Pair, count).outerjoin(counts, counts.c.pair_id == Pair.id).order_by(count.desc(), Pair.id)
        return joined.where(Pair.gold.is_(None), Pair.repeat_of.is_(None), count < self._settings.ratings, ~self._rated())

    def _rated(self, pair: Any = Pair.id) -> Any:
        """Whether they have rated a pair."""
        return exists().where(Rating.pair_id == pair, Rating.rater == self.name, HELD)

    def _repeats(self) -> list[Pair]:
        """What they rated some time ago, each as a pair of its own."""
        again = aliased(Pair)
        repeated = exists().where(again.repeat_of == Pair.id, self._rated(again.id))
        query = select(Pair).join(Rating).where(HELD, Rating.rater == self.name, Rating.choice != "skip", ~repeated)
        query = query.where(Pair.gold.is_(None), Pair.repeat_of.is_(None)).order_by(Rating.id.desc()).offset(REPEAT_AFTER).limit(LOOKED_AT)
        found = self.session.scalars(query).all()
        return [self._repeat(min(found, key=lambda pair: self._hash(pair.name, "repeat")))] if found else []

    def _repeat(self, pair: Pair) -> Pair:
        known = self.session.scalar(select(Pair).where(Pair.repeat_of == pair.id))
        if known is not None:
            return known
        kept = {column.key: getattr(pair, column.key) for column in Pair.__table__.columns if column.key not in ("id", "name", "at")}
        repeat = Pair(**kept | {"name": f"repeat/{pair.name}", "repeat_of": pair.id})
        self.session.add(repeat)
        self.session.flush()
        return repeat

    def _swapped(self, pair: str) -> bool:
        return int(self._hash(pair, "order"), 16) % 2 == 1

    def _hash(self, *of: object) -> str:
        return hashlib.blake2b(repr((self._seed, self.name, *of)).encode(), digest_size=16).hexdigest()

    def _count(self, query: Select[Any]) -> int:
        return self.session.scalar(select(func.count()).select_from(query.subquery())) or 0
