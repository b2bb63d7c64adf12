"""The processes of a stage: one group, which ends with its launcher, however that ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

import psutil

GRACE_SECONDS = 20
SECONDS_TO_STOP = GRACE_SECONDS + 5  # of a group that holds others, with guards of their own
STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """SIGTERM or SIGINT came."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM and SIGINT raise Stopped, so that everything on the way is tidied up."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_its_starters() -> None:
    """Send this process SIGTERM once the flow, or the dvc, that runs it has ended.

    A killed dvc leaves the shell between the two alive, so that no signal of a parent's death would come here. A killed flow leaves dvc.
    """
    starters = [int(os.environ["RLHF_FLOW_PID"])] if "RLHF_FLOW_PID" in os.environ else []
    if "DVC_STAGE" in os.environ:
        ancestors = psutil.Process().parents()
        starters += [process.pid for process in ancestors if "dvc" in (Path(part).name for part in process.cmdline()[:3])]
    for pid in starters:
        threading.Thread(target=_await_end, args=(pid,), daemon=True).start()


def _await_end(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        # a pidfd becomes readable when its process ends
        select.select([os.pidfd_open(pid)], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def group() -> Iterator[int]:
    """A process group that is stopped on the way out, and also when this process is killed by SIGKILL.

    A forked guard leads the group and reads from a pipe that only this process holds open. When the pipe closes, the guard stops
    what is left. The guard also inherits this process's locks, which are thus held for as long as something of the group is alive.
    """
    reading, writing = os.pipe()
    # no signal may reach the fork before it is a guard, else two processes would unwind the same stack
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    guard = os.fork()
    if guard == 0:
        _guard(reading, writing)
    os.setpgid(guard, guard)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    os.close(reading)
    try:
        yield guard
    finally:
        os.close(writing)
        os.waitpid(guard, 0)


def _guard(reading: int, writing: int) -> NoReturn:
    os.setpgid(0, 0)
    try:
        os.close(writing)
        os.read(reading, 1)
        # its own SIGTERM is blocked since before the fork
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(pid != os.getpid() for pid in living(os.getpid())) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def stop_groups(groups: Sequence[int]) -> None:
    """End groups of dvc: that at once, the stage's launcher, whose lock the next run needs, when the step under way is in a checkpoint."""
    for group in groups:  # all of them first: side by side, two take no longer than one
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while any(any(living(group)) for group in groups) and time.monotonic() < deadline:
        time.sleep(0.1)
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def living(group: int) -> Iterator[int]:
    """The processes of a group that have not ended."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float, on_line: Callable[[str], None]) -> int:
    """Run a command in a group of its own, giving each line that it writes to `on_line`; its exit code.

    Raises:
        subprocess.TimeoutExpired: it ran longer than `seconds`, and was stopped.
        Stopped: this process was told to stop, and stopped the command.
    """
    with ExitStack() as afterwards, group() as leader:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            process_group=leader,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdout
        reader = threading.Thread(target=_read, args=(process.stdout, on_line), daemon=True)
        reader.start()
        # bounded: a process that left the group may hold the pipe open
        afterwards.callback(reader.join, 5)
        afterwards.callback(process.wait)
        return process.wait(seconds)


def _read(stream: IO[str], on_line: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            on_line(line.rstrip("\n"))
