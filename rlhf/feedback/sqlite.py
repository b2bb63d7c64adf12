"""The file of a record, while it may be deleted, or another one put in its place."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

from rlhf.errors import UserError
from rlhf.feedback.tables import LAYOUT, Layout

SECONDS_TO_PART = 1.0  # for who writes at that moment
SETTINGS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")


class File:
    """What an engine's connections are to know of their file.

    SQLite keeps what it acknowledged last in a log beside the file, which it finds by name: left there, it would be played over whatever
    file is put in the place of the first one. So the log is written to its own file, and deleted, before another one is opened.

    Args:
        engine: of an SQLite database.
    """

    def __init__(self, engine: Engine) -> None:
        self._path = Path(engine.url.database or "")
        self._logs = [self._path.with_name(f"{self._path.name}-{log}") for log in ("wal", "shm")]
        self._opened: dict[Path, int | None] = {}  # which files they were
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

    def _connected(self, connection: sqlite3.Connection, _: Any) -> None:
        try:
            self.check()
            connection.isolation_level = None
            check_tables(connection)
            for setting in SETTINGS:
                connection.execute(f"PRAGMA {setting}").close()
            connection.execute("SELECT count(*) FROM sqlite_master").close()  # from here on the log is there
        except BaseException:
            connection.close()
            raise
        self._opened = self._opened or {path: _number(path) for path in (self._path, *self._logs)}

    def _taken(self, connection: sqlite3.Connection, *_: Any) -> None:
        """What is written to a file that went would be acknowledged, and gone; and what is there now has not been looked at."""
        if not self.is_there:
            self._part(connection)
            self.check()

    def _part(self, connection: sqlite3.Connection) -> None:
        """Whoever writes at that moment does so to a log without a name, and is told afterwards."""
        with suppress(sqlite3.Error):
            connection.execute(f"PRAGMA busy_timeout = {1000 * SECONDS_TO_PART:.0f}").close()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        for log in self._logs:
            if (number := self._opened[log]) is not None and _number(log) == number:
                log.unlink(missing_ok=True)


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
    return path.stat().st_ino if path.is_file() else None
