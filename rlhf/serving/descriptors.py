"""Connections that the system lets this process keep: each is an open file, and beyond their number nothing can be opened any more."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError

logger = logging.getLogger(__name__)

SPARE = 128  # files of models, databases, logs, libraries
MOST_AT_ONCE = 2048  # that are taken in one go, as uvicorn has it
RAISE = "raise it: `ulimit -n` of the shell, or LimitNOFILE= of systemd"
NONE_LEFT = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class Connections:
    """How many are kept, and how many more may come in one go, before what is too many is let go."""

    most: int
    at_once: int


def available(wanted: int) -> Connections:
    """As many connections as are wanted, or as the system allows; its limit is raised as far as it may be.

    Raises:
        UserError: it leaves none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + MOST_AT_ONCE + SPARE
    if soft == resource.RLIM_INFINITY or soft < needed:  # infinity is −1
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    at_once = min(MOST_AT_ONCE, soft // 8)
    most = min(wanted, soft - at_once - SPARE)
    if most < 1:
        raise UserError(f"the system lets this process open {soft} files, which leaves none for a connection", remedy=RAISE)
    return Connections(most, at_once)


def told(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A loop's handler of exceptions: that no file is left is said in a line, and waited for."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in NONE_LEFT:
        logger.error("no file is left for another connection (%s), which waits; %s", error.strerror, RAISE)
    else:
        loop.default_exception_handler(context)
