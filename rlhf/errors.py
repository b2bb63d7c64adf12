"""The one kind of error that a user can mend; and what to tell of a full disk, which any part may meet."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from rlhf.redact import redact


class UserError(Exception):
    """Something outside the code is wrong: a file, a row, a value, a port.

    The command line prints it as one line, without a traceback, and exits with code 1.

    Args:
        what: names the thing and what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, remedy: str) -> None:
        # it goes to logs, and to Prefect's database
        self.what = redact(what)
        self.remedy = redact(remedy)
        super().__init__(f"{self.what} ({self.remedy})")


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as one line of a terminal or two go; what it announces with a colon is said, too."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    cause = next(iter(filter(None, map(str.strip, others))), "") if first.rstrip().endswith(":") else ""
    return f"{first.rstrip()} {cause}".strip()[:200]


def full_disk(error: BaseException, place: Path) -> UserError | None:
    """What to tell where a write failed because the disk of `place` is full; None where that is not why.

    torch and safetensors raise errors of their own, without an errno, and leave what they could write.
    """
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    by_name = "No space left on device" in str(error)
    by_measure = isinstance(error, RuntimeError) and shutil.disk_usage(place).free < 1 << 20
    if not (by_number or by_name or by_measure):
        return None
    remedy = "make room (`rlhf gc --dry-run` lists what nothing needs), then run again: a stage goes on from its last checkpoint"
    return UserError(f"the disk of {place} is full", remedy=remedy)
