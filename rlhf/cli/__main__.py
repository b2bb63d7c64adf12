"""The command `rlhf` as a process, which is `python -m rlhf.cli` as well."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from rlhf.cli.main import main


def start() -> None:
    """Run the command line, and end the process with it.

    All that is to be done at the end is done, and then the interpreter is not taken apart: its search for garbage among all that Prefect,
    MLflow and DVC load takes two seconds, and a thread that is still in a library of C++ then (one that waits for a server which does not
    answer) aborts the process, whose work is done.
    """
    code = 1  # of an error that nobody caught: its traceback is told before

    def leave() -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # who read it has left
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered, and so the last to be called
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


if __name__ == "__main__":
    start()
