"""Ratings become data by themselves: so many of them, or so many hours, have `rlhf ingest --feedback` run, which sets off the retraining.

In a process of its own: the server's is for answers. Prefect's server is told there, as of any other new rows.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from sqlalchemy import func, select

from rlhf.config import Params
from rlhf.errors import first_line
from rlhf.feedback.database import Database, Kept
from rlhf.feedback.tables import Opinion, Rating, now
from rlhf.feedback.verdicts import waiting

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 60.0  # unless a rating comes
SECONDS_AFTER_A_REFUSAL = 600.0


class Ratings:
    """The record as raters use it, and what looks at the ratings as they come.

    Args:
        root: the workspace.
        params: of it.
        kept: the record.
    """

    def __init__(self, root: Path, params: Params, kept: Kept) -> None:
        self.params = params
        self._root, self._settings = root, params.feedback
        self._asked, self._stopping = threading.Event(), threading.Event()
        self._not_before = 0.0
        self._kept = kept
        self.problem: str | None = None  # why they were not ingested the last time
        self._looking = threading.Thread(target=self._look_on, name="ingesting", daemon=True)

    @property
    def record(self) -> Database:
        """The record, open.

        Raises:
            UserError: it cannot be.
        """
        return self._kept.get()

    def start(self) -> None:
        if self._settings.ingest_ratings or self._settings.ingest_hours:
            self._looking.start()

    def stop(self) -> None:
        self._stopping.set()
        self._asked.set()
        if self._looking.is_alive():
            self._looking.join()
        self._kept.leave()

    def rated(self) -> None:
        """Look soon: there is one more."""
        self._asked.set()

    def _look_on(self) -> None:
        while not self._stopping.is_set():
            self._asked.clear()
            try:
                if time.monotonic() >= self._not_before:
                    if self.due():
                        self._ingest()
                    else:
                        self.problem = None  # somebody has done it by hand
            except Exception as error:  # of whatever kind: it looks again
                self._refused(first_line(error))
            self._asked.wait(SECONDS_BETWEEN_LOOKS)

    def due(self) -> bool:
        """Whether there are ratings enough, or some that have waited long enough."""
        many, hours = self._settings.ingest_ratings, self._settings.ingest_hours
        with self.record.reading() as session:
            count = waiting(session, self._settings.ratings)
            if many and count >= many:
                return True
            edits = session.scalar(select(func.count()).where(Opinion.edit.is_not(None), Opinion.ingested.is_(None)))
            if not hours or not (count or edits):
                return False
            done = [session.scalar(select(func.max(table.ingested))) for table in (Rating, Opinion)]
            came = [session.scalar(select(func.min(table.at))) for table in (Rating, Opinion)]
            last = max(filter(None, done), default=None) or min(filter(None, came))
            return now() - last >= timedelta(hours=hours)

    def _ingest(self) -> None:
        command = [sys.executable, "-m", "rlhf.cli", "ingest", "--feedback"]
        done = subprocess.run(command, cwd=self._root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            logger.warning("ingest: %s", line)
        if done.returncode:
            self._refused((done.stderr.splitlines() or ["it failed"])[-1])
        else:
            self.problem = None

    def _refused(self, why: str) -> None:
        self.problem = f"ratings were not ingested: {why}"
        logger.error("%s", self.problem)
        self._not_before = time.monotonic() + SECONDS_AFTER_A_REFUSAL
