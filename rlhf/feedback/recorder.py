"""Writes answers to the record from a thread of its own: whoever is answered never waits for a database."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from queue import Empty, Full, Queue
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from rlhf.errors import first_line
from rlhf.feedback.database import Kept, is_away, is_locked
from rlhf.feedback.tables import Answer, now

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
MOST = 2000  # answers that wait to be written; further ones are not recorded
BATCH = 200
SECONDS_TO_GATHER = 0.1  # answers that end within it are written in one transaction
SECONDS_TO_WAIT = 2.0  # between tries, while the database is away
SECONDS_TO_FLUSH = 10.0
SECONDS_BETWEEN_CLEARINGS = 3600.0
INSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class Recorder:
    """Records answers, each once. While the database is away or locked they wait; what finds no room any more is counted.

    Args:
        record: where they go.
        most: answers that wait at most.
        days: that an answer is kept which nobody speaks of or is to rate; None: for good.
    """

    def __init__(self, record: Kept, most: int = MOST, days: int | None = None) -> None:
        self._record, self._days = record, days
        self._next_clearing = 0.0
        self._rows: Queue[Row] = Queue(most)
        self._now: list[Row] = []  # those that are being written
        self.written = self.dropped = 0
        self.problem: str | None = None  # why nothing is written
        self._stopping = threading.Event()
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._rows.qsize()

    def awaits(self, reply: str) -> bool:
        """Whether an answer of a reply is still to be written."""
        with self._rows.mutex:
            rows = [*self._rows.queue, *self._now]
        return any(row["reply"] == reply for row in rows)

    def put(self, row: Row) -> None:
        """Have an answer recorded; it never waits, and never fails."""
        try:
            self._rows.put_nowait(row)
        except Full:
            self._drop(1, "too many wait to be written")

    def stop(self) -> None:
        """Write what waits, as far as that goes within seconds."""
        self._deadline = time.monotonic() + SECONDS_TO_FLUSH
        self._stopping.set()
        self._thread.join(SECONDS_TO_FLUSH + 1)
        if self._thread.is_alive():  # it waits for somebody else's transaction, and ends with the process
            self._drop(self.waiting, self.problem or "the database is locked")

    def _run(self) -> None:
        while rows := self._batch():
            self._write(rows)
            self._now = []
            self._clear()
        self._record.leave()

    def _batch(self) -> list[Row]:
        """The next answers; none once all are written and no more come."""
        rows = self._now = list[Row]()
        while not rows and not (self._stopping.is_set() and self._rows.empty()):
            try:
                rows.append(self._rows.get(timeout=SECONDS_TO_GATHER))
            except Empty:
                self._clear()
                self._record.leave(replaced=True)
                continue
            self._stopping.wait(SECONDS_TO_GATHER)
            while len(rows) < BATCH and not self._rows.empty():
                rows.append(self._rows.get_nowait())
        return rows

    def _write(self, rows: Sequence[Row]) -> None:
        """Write answers, when they can be written; one that never can is dropped, and does not hold up the others."""
        while True:
            try:
                written = self._insert(rows)
            except Exception as error:
                if is_away(error):
                    self._tell(first_line(error))
                    if not is_locked(error):
                        self._record.leave()  # it may come back as another one, without tables
                    if not self._stopping.wait(SECONDS_TO_WAIT) or self._more_time():
                        continue
                    self._drop(len(rows), self.problem or "")
                elif len(rows) > 1:
                    for row in rows:
                        self._write([row])
                else:
                    self._drop(1, first_line(error))
            else:
                self.written += written
                self._tell(None)
            return

    def _more_time(self) -> bool:
        time.sleep(min(SECONDS_TO_GATHER, max(0.0, self._deadline - time.monotonic())))
        return time.monotonic() < self._deadline

    def _insert(self, rows: Sequence[Row]) -> int:
        """Insert answers; how many. A shadow is left out whose answer is not there: its user has been forgotten meanwhile."""
        record = self._record.get()
        answers, shadows = ([row for row in rows if row.get("shadow", False) is shadow] for shadow in (False, True))
        with record.writing() as session:
            # an acknowledgement that was lost on the way must not make an answer two
            insert = _insert_into(session).on_conflict_do_nothing()
            if answers:
                session.execute(insert, answers)
            if shadows:
                beside = select(Answer.correlation).where(Answer.correlation.in_([row["correlation"] for row in shadows]), ~Answer.shadow)
                known = {*session.scalars(beside)}
                shadows = [row for row in shadows if row["correlation"] in known]
            if shadows:
                session.execute(insert, shadows)
        return len(answers) + len(shadows)

    def _clear(self) -> None:
        """Now and then, have what is too old deleted; where that fails, it is tried again an hour later."""
        if self._days is None or self._stopping.is_set() or time.monotonic() < self._next_clearing:
            return
        self._next_clearing = time.monotonic() + SECONDS_BETWEEN_CLEARINGS
        try:
            gone = self._record.get().expire(now() - timedelta(days=self._days))
        except Exception as error:
            logger.error("record: answers of more than %d days ago are not deleted: %s", self._days, first_line(error))
        else:
            if gone:
                logger.warning("record: %d answers of more than %d days ago are deleted (serving.keep_days)", gone, self._days)

    def _tell(self, problem: str | None) -> None:
        if problem != self.problem:
            logger.warning("record: %s", f"nothing is written: {problem}" if problem else "answers are written again")
        self.problem = problem

    def _drop(self, count: int, why: str) -> None:
        if self.dropped == 0 or self.dropped // 100 != (self.dropped + count) // 100:  # a full queue would fill the log as well
            logger.error("record: answers are not recorded, %d so far: %s", self.dropped + count, why)
        self.dropped += count


def _insert_into(session: Session) -> Any:
    return INSERTS[session.get_bind().dialect.name](Answer)
