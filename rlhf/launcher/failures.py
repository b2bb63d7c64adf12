"""Why the processes of a stage ended: whether they may come further when they are started again, or would fail in the same way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from signal import SIGKILL

# what Python writes last of an error; ranks, and the nodes of a hostfile, put their names before it
RAISED = re.compile(r"([\w.-]+: )?(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b.*")
# what is told of a node or a connection that was lost: by Python, gloo, NCCL, torch's store and ssh
LOST = re.compile(
    r"Connection\w*Error|BrokenPipeError|TimeoutError|DistNetworkError|(Connect|Read|Remote)\w*(Timeout|Error)\b|broken pipe"
    r"|connection (was |has been )?(reset|closed|refused|aborted|lost)|connection to \S+ (closed|timed out)|timed out (after|waiting)"
    r"|(connection|operation|socket) timed? ?out|no route to host|ncclRemoteError|remote process exited|unhandled system error"
    r"|Watchdog caught collective",
    re.IGNORECASE,
)
MAY_PASS = "a further try may go better"
LOG = "; its log: "  # what the launcher says of a stage that did not explain itself
FROM_DVC = "ERROR: failed to reproduce"
# of a process; as DeepSpeed's launcher ends with it; as a shell does; 0: what it says where a part of it was killed
KILLED = (-SIGKILL, 256 - SIGKILL, 128 + SIGKILL, 0)


def may_pass(code: int, told: Iterable[str]) -> bool:
    """Whether a failure may be gone the next time: the system killed a process (out of memory), or a node or a connection was lost.

    Everything else repeats itself: a stage is a function of its inputs.

    Args:
        code: that the stage's launcher ended with, though the stage did not come to its end.
        told: the lines of the stage that tell of an exception, or of something lost.
    """
    told = list(told)
    # of two ranks, one fails, and the other has lost its connection to it
    return code in KILLED or (bool(told) and all(LOST.search(line) for line in told))


def tells(line: str) -> bool:
    """Whether a line of a stage tells why it failed."""
    return bool(RAISED.fullmatch(line) or LOST.search(line))


def lasting(lines: Iterable[str]) -> bool:
    """Whether a `dvc repro` that failed would fail again, by its last lines; not where the system killed it, or a connection was lost."""
    lines = list(lines)
    # the launcher tells of its stage, and dvc of a launcher that was killed itself
    killed = any(line.startswith(FROM_DVC) and line.endswith(("exited with -9", "exited with 137")) for line in lines)
    explained = any(line.startswith("error: ") for line in lines)
    return explained or not (killed or any(f"; {MAY_PASS}" in line for line in lines))


def reason(lines: list[str]) -> str:
    """Why a command ended, of its last lines: its own `error:` with the remedy; else its last exception, and where its log is."""
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if starts:
        return " | ".join(lines[starts[-1] :][:2])
    raised = [line for line in lines if RAISED.fullmatch(line)]
    ended = [line for line in lines if LOG in line]
    if ended:
        said, _, log = ended[-1].partition(LOG)
        return f"{raised[-1] if raised else said}{LOG}{log}"
    return (raised or lines or ["it said nothing"])[-1]
