"""The file of a record, while it may be deleted, or another one put in its place."""

from __future__ import annotations

import logging
import sqlite3
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

from rlhf.errors import UserError
from rlhf.feedback.tables import LAYOUT, Layout

logger = logging.getLogger(__name__)
SETTINGS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")
SECONDS_TO_PART = 1  # for those who read or write at that moment


class File:
    """What an engine's connections are to know of their file.

    SQLite keeps what it acknowledged last in a log beside the file, which it finds by name: left there, it would be played over whatever
    file is put in the place of the first one. So the log is written to its own file, and taken away, before another one is opened. One
    connection is held for that, whatever the others do; SQLite would also delete the log with the last of them.

    Args:
        engine: of an SQLite database.
    """

    def __init__(self, engine: Engine) -> None:
        self._path = Path(engine.url.database or ":memory:")
        self._logs = [self._path.with_name(f"{self._path.name}-{log}") for log in ("wal", "shm")]
        self._opened: dict[Path, int | None] = {}  # which files they were
        self._held: sqlite3.Connection | None = None
        self._leaving = threading.Lock()
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkout", self._taken)
        event.listen(engine, "begin", _begun)

    @property
    def is_there(self) -> bool:
        """Whether the file, and its logs, are those that were opened."""
        return all(_number(path) == number for path, number in self._opened.items())

    def check(self) -> None:
        """See that what was written is in the file that has this name.

        Raises:
            UserError: that was deleted or replaced meanwhile.
        """
        if not self.is_there:
            raise UserError("the file of the record was deleted or replaced", remedy="try again: it is opened anew")

    def close(self) -> None:
        """Hold the file no more, and leave no log of one that went."""
        with self._leaving:
            if self._held:
                if not self.is_there:
                    self._part(self._held)
                self._held.close()
            self._held = None

    def _connected(self, connection: sqlite3.Connection, _: Any) -> None:
        try:
            self.check()
            connection.isolation_level = None
            check_tables(connection)
            for setting in SETTINGS:
                connection.execute(f"PRAGMA {setting}").close()
            if not self._opened and _number(self._path) is not None:  # one in memory has no file, and an address may name it otherwise
                self._hold()
        except BaseException:
            connection.close()
            raise

    def _hold(self) -> None:
        self._held = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=SECONDS_TO_PART)
        self._held.execute("SELECT count(*) FROM sqlite_master").close()  # from here on the log is there
        self._opened = {path: _number(path) for path in (self._path, *self._logs)}

    def _taken(self, *_: Any) -> None:
        """What is written to a file that went would be acknowledged, and gone; and what is there now has not been looked at."""
        if not self.is_there:
            self.close()
            self.check()

    def _part(self, held: sqlite3.Connection) -> None:
        try:
            busy = held.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        except sqlite3.Error:
            busy = True
        log, index = self._logs
        with suppress(OSError):
            if _number(index) == self._opened[index]:
                index.unlink()
            if _number(log) == self._opened[log] and busy:  # somebody reads on in the file that went: it lacks what came since
                aside = log.with_name(f"{self._path.name}.{self._opened[self._path]}-wal")
                log.rename(aside)
                what = "%s: the file was replaced while somebody read it; what it lacks is in %s: put that beside it, as NAME-wal"
                logger.error(what, self._path, aside.name)
            elif _number(log) == self._opened[log]:
                log.unlink()


def check_tables(connection: sqlite3.Connection) -> None:
    """See that a file is empty or a record of this layout, and change nothing.

    Raises:
        UserError: it is something else.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and Layout.__tablename__ not in tables:
        what = f"the file has other tables than a record of answers and ratings ({', '.join(sorted(tables)[:3])})"
        raise UserError(what, remedy="give another serving.database")
    if tables:
        check_layout(next((number for (number,) in connection.execute(f"SELECT number FROM {Layout.__tablename__}")), LAYOUT))


def check_layout(found: int) -> None:
    """See that the tables are as this code knows them.

    Raises:
        UserError: they are not.
    """
    if found != LAYOUT:
        what = f"the record of answers and ratings has its tables in layout {found}, and this code knows layout {LAYOUT}"
        raise UserError(what, remedy="use the code that made them (git log -- rlhf/feedback/tables.py), or give another serving.database")


def _begun(connection: Connection) -> None:
    """The driver's own transactions begin as ones that read, and one that goes on to write fails at once where another has written."""
    kind = "IMMEDIATE" if connection.get_execution_options().get("rlhf_writing") else "DEFERRED"
    connection.exec_driver_sql(f"BEGIN {kind}")


def _number(path: Path) -> int | None:
    try:
        status = path.stat()
    except OSError:  # it went at this moment, or nobody may look
        return None
    return status.st_ino if stat.S_ISREG(status.st_mode) else None
