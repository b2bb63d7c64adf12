"""The record: answers that were given, pairs of answers to be rated, ratings, and opinions that an application sends.

Nothing of it is trained on by being here. A user is known by a keyed hash alone, and what hangs on an answer of theirs goes with it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from sqlalchemy import JSON, BigInteger, CheckConstraint, DateTime, ForeignKey, Index, String, Text, TypeDecorator, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

Source = Literal["shadow", "evaluation", "sample", "given"]
Choice = Literal["a", "b", "tie", "both-bad", "skip"]
# of the pair's own answers, in whatever order they were shown
Verdict = Literal["first", "second", "tie", "both-bad", "skip"]
Dialogue = list[dict[str, str]]
Thumb = Literal[-1, 1]

CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "both-bad", "skip")
SOURCES: tuple[Source, ...] = ("shadow", "evaluation", "sample", "given")


class Moment(TypeDecorator[datetime]):
    """A time with its zone; SQLite keeps none, so that UTC is what is stored."""

    impl, cache_ok = DateTime, True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.replace(tzinfo=UTC)


def held(text: str | None) -> str | None:
    """A text as the record holds it: what a database cannot hold of it (NUL in PostgreSQL, half of a character) is unknown."""
    return text and text.replace("\0", "\ufffd").encode(errors="replace").decode()


class Words(TypeDecorator[str]):
    """A text, as `held` has it."""

    impl, cache_ok = Text, True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return held(value)


def now() -> datetime:
    return datetime.now(UTC)


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(map(repr, values))})", name=f"{column}_known")


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {
        str: Words,
        datetime: Moment,
        dict[str, Any]: JSON(none_as_null=True),
        Dialogue: JSON(none_as_null=True),
    }


LAYOUT = 1  # of the tables below: one more whenever a column comes, goes or means something else


class Layout(Base):
    """Which layout the tables have, in one row: what made them may be older or newer than what reads them."""

    __tablename__ = "layout"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


WHOLE = "stop"  # how an answer finished that was not cut off

TAKING = datetime(1970, 1, 1, tzinfo=UTC)  # in the place of when: an ingest is at it, or was killed while it was


class Answer(Base):
    """One that the server wrote: each of the `n` of a reply by itself."""

    __tablename__ = "answers"
    __table_args__ = (UniqueConstraint("reply", "choice"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    reply: Mapped[str] = mapped_column(String(80))  # id of the reply, as the client got it
    choice: Mapped[int]  # 0 unless several were asked for
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    conversation: Mapped[str | None] = mapped_column(String(64), index=True)  # keyed hash
    user: Mapped[str | None] = mapped_column(String(64), index=True)  # keyed hash
    key: Mapped[str | None] = mapped_column(String(80))  # name of the key that asked; None: none was needed
    messages: Mapped[Dialogue | None]  # of chat
    prompt: Mapped[str | None]  # of completions
    text: Mapped[str]
    asked: Mapped[str] = mapped_column(String(200))  # the model that the client named
    arm: Mapped[str | None] = mapped_column(String(80))  # the alias that it came to; None: a version was named
    version: Mapped[str] = mapped_column(String(200))  # that answered: assistant/3
    digest: Mapped[str] = mapped_column(String(64))  # SHA-256 of its list of files
    sampling: Mapped[dict[str, Any]]  # temperature, top_p, max_tokens, stop
    seed: Mapped[int] = mapped_column(BigInteger)  # of this choice
    finish: Mapped[str] = mapped_column(String(20))
    prompt_tokens: Mapped[int]
    answer_tokens: Mapped[int]
    seconds: Mapped[float]
    # what a shadow has in common with the answer that it was written beside; that one went to the user, the shadow to nobody
    correlation: Mapped[str | None] = mapped_column(String(64), index=True)
    shadow: Mapped[bool] = mapped_column(default=False)
    consented: Mapped[bool] = mapped_column(default=False)  # the request said so; else it is here because serving.keep is all

    opinions: Mapped[list[Opinion]] = relationship(back_populates="answer", passive_deletes=True)


class Pair(Base):
    """Two answers to a prompt, to be rated."""

    __tablename__ = "pairs"
    __table_args__ = (_one_of("source", SOURCES), _one_of("gold", ("first", "second", "tie", "both-bad")))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)  # what makes it: inserted again, it is there once
    at: Mapped[datetime] = mapped_column(default=now)
    source: Mapped[str] = mapped_column(String(20))
    prompt: Mapped[Dialogue]
    first_text: Mapped[str]
    first_version: Mapped[str] = mapped_column(String(200))
    first_seed: Mapped[int | None] = mapped_column(BigInteger)
    first_answer: Mapped[int | None] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"), index=True)  # where it is recorded
    second_text: Mapped[str]
    second_version: Mapped[str] = mapped_column(String(200))
    second_seed: Mapped[int | None] = mapped_column(BigInteger)
    second_answer: Mapped[int | None] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"), index=True)
    sampling: Mapped[dict[str, Any] | None]  # that both were written with
    gold: Mapped[str | None] = mapped_column(String(20))  # the verdict that is known to be right: raters are measured by it
    repeat_of: Mapped[int | None] = mapped_column(ForeignKey("pairs.id", ondelete="CASCADE"), index=True)  # shown again, unsaid

    ratings: Mapped[list[Rating]] = relationship(back_populates="pair", passive_deletes=True)


class Rating(Base):
    """What a rater chose: of a rater and a pair one holds. None is changed, but that an undo revokes it and an ingest takes it."""

    __tablename__ = "ratings"

    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(80), unique=True)  # the client's own: sent twice, it is there once
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id", ondelete="CASCADE"))
    rater: Mapped[str] = mapped_column(String(80), index=True)
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    swapped: Mapped[bool]  # the order that was drawn: the pair's second answer was shown as A
    choice: Mapped[str] = mapped_column(String(20))  # as it was pressed
    reason: Mapped[str | None]
    edit: Mapped[str | None]  # the better answer, made better still
    seconds: Mapped[float | None]
    revoked: Mapped[datetime | None] = mapped_column()
    ingested: Mapped[datetime | None]  # when it became data, if it did

    pair: Mapped[Pair] = relationship(back_populates="ratings")

    @property
    def is_data(self) -> bool:
        return self.ingested not in (None, TAKING)

    __table_args__ = (
        _one_of("choice", CHOICES),
        Index("one_holds", pair_id, rater, unique=True, sqlite_where=revoked.is_(None), postgresql_where=revoked.is_(None)),
    )

    @property
    def verdict(self) -> Verdict:
        if self.choice in ("a", "b"):
            return "second" if (self.choice == "b") != self.swapped else "first"
        return self.choice  # type: ignore[return-value]  # the table checks it


class Opinion(Base):
    """What an application says of an answer that it was given."""

    __tablename__ = "opinions"
    __table_args__ = (CheckConstraint("thumb IN (-1, 1)", name="thumb_known"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(80), unique=True)  # the client's own, or one made for it
    answer_id: Mapped[int] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    key: Mapped[str | None] = mapped_column(String(80))  # name of the key that said it
    thumb: Mapped[int | None]  # 1 up, -1 down
    comment: Mapped[str | None]
    edit: Mapped[str | None]  # the answer as it should have been
    ingested: Mapped[datetime | None]  # when it became data, if it did

    answer: Mapped[Answer] = relationship(back_populates="opinions")
