"""How far a stage is, as a progress artifact of Prefect that moves while it runs."""

from __future__ import annotations

import threading
from contextvars import copy_context
from types import TracebackType
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

SECONDS_BETWEEN_MOVES = 2.0
SECONDS_AT_THE_END = 10.0


def show_whole(stage: str, text: str) -> None:
    """The progress artifact of a stage that has nothing to do, as a whole."""
    try:
        create_progress_artifact(100.0, key=_key(stage), description=f"{stage}: {text}")
    except Exception as error:
        _warn(stage, error)


class Bar:
    """The progress artifact of one stage, as a context. A thread moves it: no stage waits for Prefect, or fails because of it."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._shown = (0.0, "starting")
        self._ending = threading.Event()
        # the thread's artifacts belong to the task run of who made the bar
        self._thread = threading.Thread(target=copy_context().run, args=(self._follow,), daemon=True)

    def __enter__(self) -> Bar:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join(SECONDS_AT_THE_END)

    def move(self, text: str, share: float | None = None) -> None:
        """Say how far the stage is.

        Args:
            text: in words.
            share: of its steps, from 0 to 1; None: as before.
        """
        self._shown = (self._shown[0] if share is None else 100 * share, f"{self._stage}: {text}")

    def _follow(self) -> None:
        try:
            shown = self._shown
            # Prefect gives a coroutine instead where an event loop runs, which none does in a thread
            artifact = cast(UUID, create_progress_artifact(shown[0], key=_key(self._stage), description=shown[1]))
            ending = False
            while not ending:
                ending = self._ending.wait(SECONDS_BETWEEN_MOVES)
                if self._shown != shown:
                    shown = self._shown
                    update_progress_artifact(artifact, shown[0], description=shown[1])
        # the server is away: the stage goes on all the same
        except Exception as error:
            _warn(self._stage, error)


def _key(stage: str) -> str:
    return f"progress-{stage}".replace("_", "-").lower()


def _warn(stage: str, error: Exception) -> None:
    get_run_logger().warning("no progress is shown of stage %s: %s", stage, error)
