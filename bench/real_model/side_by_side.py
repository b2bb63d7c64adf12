"""Processes that wait for each other, several at a time: those whose turn it is and for which there is room, until a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SECONDS_BETWEEN_LOOKS = 0.2
SKIPPED, CUT_OFF = "skipped", "cut off"


@dataclass(frozen=True)
class Start:
    """What a process is started with; all that it prints goes to `log`."""

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    log: Path


@dataclass(frozen=True)
class Task:
    """A process to come.

    Args:
        start: makes ready what the process needs, once all that it waits for has succeeded.
        after: names of tasks that it waits for.
        gib: what it takes of the room at most.
        late: it begins once all that are less late have begun, but for those that nothing waits for.
    """

    name: str
    start: Callable[[], Start]
    after: tuple[str, ...] = ()
    gib: float = 0.0
    late: int = 0


@dataclass(frozen=True)
class End:
    """How a task ended: its exit code, SKIPPED where one that it waits for failed or its start did, CUT_OFF at the deadline."""

    how: int | str
    began: float = 0.0  # seconds since the first one
    seconds: float = 0.0
    gib: float = 0.0  # what it held at most, as far as the looks at it show
    why: str = ""


@dataclass
class Running:
    task: Task
    process: subprocess.Popen[bytes]
    began: float
    gib: float = 0.0


def run_all(
    tasks: Sequence[Task], together: int, room: float, seconds: float, ended: Callable[[Task, End], None], memory: Callable[[int], float]
) -> None:
    """Run tasks, of those that may begin the first one first.

    Args:
        together: how many at a time at most.
        room: GiB that they may take together; one that takes more runs alone.
        seconds: after so many, those under way are killed, and no other one begins.
        ended: called with each task as it has ended.
        memory: GiB that a process holds, by its id.
    """
    begin = time.monotonic()
    waiting, running = list(tasks), list[Running]()
    awaited = {name for task in tasks for name in task.after}
    known: dict[str, bool] = {}  # by name, whether it succeeded

    def end(task: Task, how: End) -> None:
        known[task.name] = how.how == 0
        try:
            ended(task, how)
        except Exception:  # a full disk, say: what needs this one is lost, the others go on
            known[task.name] = False
            traceback.print_exc()

    while waiting or running:
        now = time.monotonic() - begin
        for one in list(running):
            code = one.process.poll()
            with suppress(Exception):  # it has ended meanwhile, or the driver does not say
                one.gib = max(one.gib, memory(one.process.pid))
            if code is None and now < seconds:
                continue
            running.remove(one)
            kill(one.process)
            end(one.task, End(CUT_OFF if code is None else code, one.began, now - one.began, one.gib))
        for task in list(waiting):
            lacking = [name for name in task.after if known.get(name) is False]
            if lacking or now >= seconds:
                waiting.remove(task)
                end(task, End(SKIPPED, now, why=f"without {', '.join(lacking)}" if lacking else "no time was left"))
            elif any(other.late < task.late and other.name in awaited for other in waiting):
                continue
            elif all(known.get(name) for name in task.after) and fits(task, running, together, room):
                waiting.remove(task)
                try:
                    running.append(Running(task, started(task.start()), now))
                except Exception as error:  # whatever it is, the others go on
                    end(task, End(SKIPPED, now, why=f"{type(error).__name__}: {error}"))
        time.sleep(SECONDS_BETWEEN_LOOKS)


def fits(task: Task, running: Sequence[Running], together: int, room: float) -> bool:
    taken = sum(one.task.gib for one in running)
    return not running or (len(running) < together and taken + task.gib <= room)


def started(start: Start) -> subprocess.Popen[bytes]:
    start.log.parent.mkdir(parents=True, exist_ok=True)
    with start.log.open("ab") as log:
        # a group of its own, to be killed with all that it starts
        return subprocess.Popen(
            start.command,
            cwd=start.folder,
            env=start.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------------------------------------------------------- memory


def on_processor(pid: int) -> float:
    """GiB of the machine's memory that a process and its descendants hold, shared pages counted for each."""
    parent = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True))) / 2**30


def on_gpu(pid: int) -> float:
    """GiB of the first GPU that a process and its descendants hold: tensors, what their allocators keep, and their contexts."""
    import pynvml

    pynvml.nvmlInit()
    group = {pid, *(process.pid for process in psutil.Process(pid).children(recursive=True))}
    held = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    return sum(one.usedGpuMemory or 0 for one in held if one.pid in group) / 2**30
