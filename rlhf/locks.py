"""Locks between processes of one workspace: files under runs/locks, released by the system when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from rlhf.errors import UserError


@contextmanager
def lock(root: Path, name: str, *, refuse: str | None = None) -> Iterator[None]:
    """Hold the lock `name` of the workspace.

    Args:
        root: the workspace.
        name: what is locked, for example `flow`.
        refuse: what to tell a second one that comes meanwhile; None: it waits.

    Raises:
        UserError: another process holds the lock, and `refuse` is given.
    """
    path = root / "runs" / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refuse else 0))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            if psutil.pid_exists(int(holder or 0)):
                raise UserError(f"{refuse} (process {holder})", remedy="wait for it to end, or stop it") from None
            # what a killed holder had started holds the lock until it has ended too, which is a matter of seconds
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def held(root: Path, name: str) -> bool:
    """Whether a process holds the lock `name` of the workspace."""
    try:
        with (root / "runs" / "locks" / f"{name}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # lookers do not disturb each other
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def holder(root: Path, name: str) -> int | None:
    """The process that holds the lock `name` of the workspace; None where none does."""
    if not held(root, name):
        return None
    told = (root / "runs" / "locks" / f"{name}.lock").read_text(encoding="utf-8").strip()
    return int(told) if told and psutil.pid_exists(int(told)) else None
