"""Where the record lies: SQLite in the workspace, or PostgreSQL for a team."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, CursorResult, create_engine, delete, func, insert, select, text
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
    TimeoutError,
)
from sqlalchemy.orm import Session

from rlhf.config import Params
from rlhf.errors import UserError, first_line
from rlhf.feedback.sqlite import File, check_layout
from rlhf.feedback.tables import LAYOUT, Answer, Base, Layout, Opinion, Pair, Rating
from rlhf.workspace.find import home

VARIABLE = "RLHF_DATABASE_URL"
FOLDER = "feedback"
SECONDS_TO_WAIT = 20  # for somebody else's transaction
LOCK = 7_283_416  # of PostgreSQL: any number that others do not take


def address(root: Path, params: Params) -> str:
    """Where the record is: RLHF_DATABASE_URL, else serving.database, else the workspace's own file."""
    return os.environ.get(VARIABLE) or params.serving.database or f"sqlite:///{folder(root) / 'feedback.db'}"


def folder(root: Path) -> Path:
    """What git and DVC ignore of a workspace: what people said."""
    return home(root) / FOLDER


def connect(root: Path, params: Params) -> Database:
    """The record, its tables made where they are missing.

    Raises:
        UserError: its address is wrong, or nothing answers there.
    """
    place = address(root, params)
    try:
        if place.startswith("sqlite:"):
            folder(root).mkdir(mode=0o700, exist_ok=True)
        return Database(place)
    except (ArgumentError, NoSuchModuleError):
        what = "serving.database (or RLHF_DATABASE_URL) is no address of a database"
        raise UserError(what, remedy="give postgresql://USER@HOST/DATABASE, or null for a file in the workspace") from None
    except ModuleNotFoundError as error:
        what = f"serving.database: {error.name} is not installed"
        raise UserError(what, remedy="pip install -c constraints.txt -e '.[team]'") from None
    except (SQLAlchemyError, OSError) as error:
        what = f"the record of answers and ratings cannot be opened: {first_line(error)}"
        raise UserError(what, remedy=f"see that {place} is there and may be written to (serving.database)") from None


class Database:
    """Sessions of the record.

    What is written by `writing` is on the disk once its block has ended: a kill or a power cut after it loses nothing.

    Args:
        place: address, as SQLAlchemy has it.

    Raises:
        SQLAlchemyError: it cannot be opened.
        UserError: its tables have another layout, or are none of a record.
    """

    def __init__(self, place: str) -> None:
        self.engine = create_engine(place, pool_pre_ping=True, connect_args=_arguments(place))
        self._file = File(self.engine) if self.engine.dialect.name == "sqlite" else None
        self._writing = self.engine.execution_options(rlhf_writing=True)
        try:
            with self._writing.begin() as connection:  # two that start side by side would both make the tables
                if self.engine.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": LOCK})
                Base.metadata.create_all(connection)
                _check_layout(connection)
        except BaseException:
            self.close()
            raise

    @property
    def is_there(self) -> bool:
        """Whether it is what was opened: a file that was deleted or replaced has to be opened anew, as its tables may be other ones."""
        return self._file is None or self._file.is_there

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees one state of the record and changes nothing."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session whose changes are all there after the block, or none of them where it raises. It waits for others that write.

        Raises:
            UserError: the file was deleted or replaced meanwhile.
        """
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session
        if self._file:
            self._file.check()

    def forget(self, user: str) -> dict[str, int]:
        """Delete what a user asked, and all that hangs on it; how many rows of each table.

        Args:
            user: as recorded, a hash.

        Raises:
            UserError: it is deleted, but not overwritten.
        """
        asked = select(Answer.id).where(Answer.user == user)
        pairs = select(Pair.id).where(Pair.first_answer.in_(asked) | Pair.second_answer.in_(asked))
        pairs = select(Pair.id).where(Pair.id.in_(pairs) | Pair.repeat_of.in_(pairs))
        gone = {
            "answers": select(func.count()).select_from(asked.subquery()),
            "opinions": select(func.count()).where(Opinion.answer_id.in_(asked)),
            "pairs": select(func.count()).select_from(pairs.subquery()),
            "ratings": select(func.count()).where(Rating.pair_id.in_(pairs)),
        }
        with self.writing() as session:
            counts = {table: session.scalar(query) or 0 for table, query in gone.items()}
            session.execute(delete(Answer).where(Answer.user == user))
        if self.engine.dialect.name == "sqlite":
            with closing(self.engine.raw_connection()) as connection:  # else the log of writes holds the texts on
                busy, *_ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                what = "it is deleted, but somebody who reads the record holds on to the file's log, where the texts stand until they end"
                raise UserError(what, remedy="run it again")
        return counts

    def expire(self, before: datetime) -> int:
        """Delete the answers of before a moment that nobody has spoken of, and that stand in no pair to be rated; how many."""
        used = select(Pair.id).where((Pair.first_answer == Answer.id) | (Pair.second_answer == Answer.id)).exists()
        spoken_of = select(Opinion.id).where(Opinion.answer_id == Answer.id).exists()
        with self.writing() as session:
            gone = session.execute(delete(Answer).where(Answer.at < before, ~used, ~spoken_of))
        return cast("CursorResult[Any]", gone).rowcount

    def close(self) -> None:
        self.engine.dispose()
        if self._file:
            self._file.close()


class Kept:
    """The record as a server holds it, one for all its threads: opened as it is used first, and anew where it has become another one.

    Args:
        connect: opens it.
    """

    def __init__(self, connect: Callable[[], Database]) -> None:
        self._connect = connect
        self._database: Database | None = None
        self._opening = threading.Lock()
        self._refusal: tuple[float, Exception] | None = None  # when it could not be opened the last time, and why

    def get(self) -> Database:
        """The record.

        Raises:
            UserError: it cannot be opened.
        """
        came = time.monotonic()
        with self._opening:
            self._leave(replaced=True)
            if self._database is None:
                if self._refusal and self._refusal[0] > came:  # while this one waited: it is not to wait as long again
                    raise self._refusal[1]
                try:
                    self._database = self._connect()
                except Exception as error:
                    self._refusal = time.monotonic(), error
                    raise
            return self._database

    def leave(self, *, replaced: bool = False) -> None:
        """Close it.

        Args:
            replaced: only if it has become another one: before somebody opens what is there now.
        """
        if self._database:  # else it may be being opened, which takes its time
            with self._opening:
                self._leave(replaced=replaced)

    def _leave(self, *, replaced: bool) -> None:
        if self._database and not (replaced and self._database.is_there):
            self._database.close()
            self._database = None


def is_away(error: Exception) -> bool:
    """Whether the database, and not what was asked of it, is why something failed: later it may do."""
    # sqlite3 has no kind of its own for a damaged file
    away = isinstance(error, UserError | OSError | OperationalError | TimeoutError) or type(error) is DatabaseError
    return away or (isinstance(error, DBAPIError) and error.connection_invalidated)


def is_locked(error: Exception) -> bool:
    """Whether a file is there, and somebody else writes to it."""
    return isinstance(error, OperationalError) and getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY


def _check_layout(connection: Connection) -> None:
    found = connection.scalar(select(Layout.number))
    if found is None:
        connection.execute(insert(Layout).values(number=LAYOUT))
    else:
        check_layout(found)


def _arguments(place: str) -> dict[str, Any]:
    return {"timeout": SECONDS_TO_WAIT} if place.startswith("sqlite:") else {"connect_timeout": 10}
