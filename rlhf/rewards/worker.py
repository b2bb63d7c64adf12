"""A process that calls reward functions: JSON lines in, JSON lines out, one answer after another.

What a function prints goes nowhere, and what it forks can say nothing: only this process has the way to the stage.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from rlhf.rewards import answers, functions

LONGEST_ERROR = 4000  # characters


def main() -> None:
    """Serve the process that started this one, until it closes the pipe."""
    _end_with(int(sys.argv[1]))
    own, root = os.getpid(), Path.cwd()
    reading, writing = _private(0), _private(1)
    for pipe in (reading, writing):
        os.register_at_fork(after_in_child=partial(os.close, pipe.fileno()))
    asked = json.loads(reading.readline())
    kept = Path(asked["kept"]) if asked["kept"] else None
    loaded: dict[str, tuple[str, functions.Function, dict[str, Any]]] = {}
    for name, entry in asked["entries"].items():
        try:
            function = functions.load(Path(asked["root"]), entry["function"], kept)
            functions.check_options(function, entry["options"])
        except BaseException as error:
            _say(writing, {"entry": name, "error": _told(error)})
            return
        loaded[name] = entry["function"], function, entry["options"]
    _say(writing, {})
    for line in reading:
        os.chdir(root)  # wherever the last one went: the next may be another entry's
        reply = _reply(*loaded[json.loads(line)["entry"]], line)
        if os.getpid() != own:  # the function forked, and its child has come back
            os._exit(0)
        _say(writing, reply)


def _end_with(parent: int) -> None:
    """Have this process killed when the one that started it ends: it may be in a function that never does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _private(number: int) -> IO[bytes]:
    """The pipe at a descriptor, which itself leads nowhere from now on."""
    kept = os.dup(number)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, number)
    os.close(nowhere)
    return os.fdopen(kept, "rb" if number == 0 else "wb", buffering=0 if number else -1)


def _reply(kind: str, function: functions.Function, options: Mapping[str, Any], line: bytes) -> dict[str, Any]:
    asked = json.loads(line)
    # a function that draws by lot gives the same answer the same score, whichever process it comes to
    random.seed(hashlib.sha256(line).digest())
    try:
        if asked["vote"]:
            return {"vote": functions.VOTES.get(kind, answers.normalised)(asked["answer"])}
        return {"score": functions.call(function, options, asked)}
    except BaseException as error:
        return {"error": _told(error)}


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-LONGEST_ERROR:]


def _say(pipe: IO[bytes], reply: Mapping[str, Any]) -> None:
    pipe.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
