"""The candidate answers beside the champion, for nobody to see: two answers to one prompt are a pair to be rated.

A thread of its own has one shadow written at a time, and an engine writes it while no user waits for anything (rlhf/serving/engine.py).
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from typing import Any

from rlhf.config.serving import Traffic as Shares
from rlhf.serving.bodies import Asked
from rlhf.serving.counts import Counts
from rlhf.serving.record import Record, Written
from rlhf.serving.requests import ClosedError, Piece, Request, events
from rlhf.serving.versions import CANDIDATE, CHAMPION, Version, Versions

logger = logging.getLogger(__name__)

MOST = 100  # that wait to be written; further ones are dropped
MISSED = 5.0  # shadows that should have been written since the last one was: by chance that happens once in 150 times
SECONDS_TO_LOOK = 0.2

Encode = Callable[[Versions, Version, Asked], list[Request]]


@dataclass(frozen=True)
class _Job:
    """A request that the champion has answered."""

    body: Asked
    seed: int
    common: dict[str, Any]
    correlation: str


class Shadows:
    """Writes shadows of a sample of the recorded answers.

    Args:
        versions: that answer.
        record: where both answers go.
        counts: of the server.
        shares: how many of the answers get a shadow.
        encode: makes of a body what an engine is asked.
    """

    def __init__(self, versions: Versions, record: Record, counts: Counts, shares: Shares, encode: Encode) -> None:
        self._versions, self._record, self._counts, self._share, self._encode = versions, record, counts, shares.shadow, encode
        self._missed = 0.0
        self._jobs: Queue[_Job] = Queue(MOST)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shadows", daemon=True)
        for outcome in ("written", "dropped", "failed"):
            counts.shadows.labels(outcome)  # a counter that stays at nought is to be seen
        if self._share:
            self._thread.start()

    def drawn(self) -> bool:
        """Whether the answer that the champion has given now is one of the sample."""
        self._missed += self._share
        return random.random() < self._share

    def ask(self, body: Asked, seed: int, common: dict[str, Any], correlation: str) -> None:
        """Have a shadow written, some time; it never waits, and never fails.

        Args:
            body: what the client sent.
            seed: of the champion's answer.
            common: what is recorded of the request.
            correlation: that both answers are recorded with.
        """
        try:
            self._jobs.put_nowait(_Job(body, seed, common, correlation))
        except Full:
            self._counts.shadows.labels("dropped").inc()

    @property
    def warning(self) -> str | None:
        """Why there are no shadows where there should be."""
        if not self._share:
            return None
        candidate = self._versions.by_alias.get(CANDIDATE)
        if candidate is None or candidate is self._versions.by_alias.get(CHAMPION):
            return f"no shadow is written (serving.traffic.shadow is {self._share}): there is no candidate beside the champion"
        if self._missed >= MISSED:
            what = f"no shadow was written beside the last answers, {self._missed:.0f} of which should have got one"
            return f"{what}: {self._jobs.qsize()} wait until no user does; an answer that is not recorded gets none"
        return None

    def stop(self) -> None:
        """Begin no more of them; the one that is being written ends with its engine."""
        self._stopping.set()

    def join(self) -> None:
        if self._share:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                job = self._jobs.get(timeout=SECONDS_TO_LOOK)
            except Empty:
                continue
            try:
                outcome = "written" if self._write(job) else "failed"
            except Exception as error:  # of whatever kind: no user is to know
                logger.warning("a shadow could not be written: %s", error)
                outcome = "failed"
            self._counts.shadows.labels(outcome).inc()

    def _write(self, job: _Job) -> bool:
        for _ in range(3):  # the candidate may be exchanged meanwhile
            version = self._versions.by_alias.get(CANDIDATE)
            if version is None:
                return False
            (asked,) = self._encode(self._versions, version, job.body)
            request = replace(asked, seed=job.seed, choices=1, top=None, seconds=math.inf, background=True)
            try:
                written = self._answer(version, request)
            except ClosedError:
                continue
            if written.finish not in ("stop", "length"):
                return False
            common = job.common | {"prompt_tokens": len(request.prompt), "arm": CANDIDATE, "shadow": True, "correlation": job.correlation}
            self._record.put(common, f"shadow-{uuid.uuid4().hex}", 0, version, request.seed, written)
            self._missed = 0.0
            return True
        return False

    def _answer(self, version: Version, request: Request) -> Written:
        began, written = time.monotonic(), Written()
        for event in events(version.engine, request):
            if isinstance(event, Piece):
                written.text += event.text
            else:
                written.finish, written.tokens = event.finish, event.tokens
        written.seconds = time.monotonic() - began
        return written
