"""Run one DVC stage as a Prefect task: in a process group of its own, its lines in the run's log, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from rlhf.errors import UserError
from rlhf.launcher import failures, processes
from rlhf.launcher.failures import FROM_DVC, reason
from rlhf.redact import redact
from tasks.graph import Stage
from tasks.progress import Bar, show_whole

PROGRESS = re.compile(r"(?P<stage>\w+) (?P<step>\d+)/(?P<total>\d+) (?P<metrics>.*)")
LAST_LINES = 8
RETRY_DELAY_SECONDS = 2


@dataclass(frozen=True)
class Progress:
    """Something that happened to a stage. `step` and `total` stand still at 0 until it has logged its first step."""

    stage: str
    state: str  # waiting, running, up to date, done, stopped, failed
    text: str = ""
    step: int = 0
    total: int = 0


Watcher = Callable[[Progress], None]
_watchers: list[Watcher] = []
_running: set[subprocess.Popen[str]] = set()


class StageError(UserError):
    """A stage ended with an exit code other than 0.

    `lasting`: it would fail again; not where the system killed its processes, or a node or a connection was lost.
    `stopped`: it was told to end, by a signal.
    """

    def __init__(self, stage: str, code: int, lines: list[str]) -> None:
        # the launcher tells of its stage, and dvc of a launcher that was killed itself
        self.lasting = failures.lasting(lines)
        lines = [line for line in lines if not line.startswith(FROM_DVC)]
        self.stopped = -code in processes.STOPPING or any(line.startswith(f"{stage}: stopped by ") for line in lines)
        said = f"stage {stage} was stopped" if self.stopped else f"stage {stage} failed with exit code {code}: {reason(lines)}"
        super().__init__(said, remedy="see its log")


def watch(watcher: Watcher) -> None:
    """Call `watcher` with each Progress of each stage from now on, from the stages' threads."""
    _watchers.append(watcher)


def announce(stages: Sequence[Stage]) -> None:
    """Tell the watchers which stages a flow has before it."""
    for stage in stages:
        _tell(Progress(stage.name, "waiting"))


def _tell(progress: Progress) -> None:
    for watcher in _watchers:
        watcher(progress)


def stop_all() -> None:
    """Kill the process groups of all that is running."""
    stopping = list(_running)
    for process in stopping:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in stopping:  # side by side, so that two stages take no longer than one
        _kill(process)


def _worth_retrying(_task: object, _task_run: object, state: State[Any]) -> bool:
    return not getattr(state.result(raise_on_failure=False), "lasting", False)


# no task has tags: of each, Prefect asks its server for a limit, which that refuses for two seconds while it writes
@task(
    cache_policy=NO_CACHE,
    task_run_name="{stage.name}",
    retry_delay_seconds=RETRY_DELAY_SECONDS,
    retry_condition_fn=_worth_retrying,
)
def run_stage(stage: Stage, root: Path, environment: dict[str, str]) -> State[Any] | None:
    """Bring one stage up to date.

    Raises:
        StageError: its command failed.
    """
    if stage.current:
        _tell(Progress(stage.name, "up to date"))
        show_whole(stage.name, "up to date")
        return Completed(name="Cached", message="up to date")
    with Bar(stage.name) as bar:

        def tell(progress: Progress) -> None:
            share = 1.0 if progress.state == "done" else progress.step / progress.total if progress.total else None
            bar.move(progress.text or progress.state, share)
            _tell(progress)

        tell(Progress(stage.name, "running"))
        lines: deque[str] = deque(maxlen=LAST_LINES)

        def take(line: str) -> None:
            lines.append(line)
            tell(_progress(stage.name, line))

        # --wait-for-lock: a stage that ends while another one commits would be lost without it
        code = follow(["dvc", "--wait-for-lock", "repro", "--single-item", stage.name], root, environment, take)
        if code:
            failure = StageError(stage.name, code, list(lines))
            tell(Progress(stage.name, "stopped" if failure.stopped else "failed", failure.what))
            raise failure
        tell(Progress(stage.name, "done"))
        return None


def follow(command: list[str], root: Path, environment: dict[str, str], take: Callable[[str], None]) -> int:
    """Run one of the environment's programs in a session of its own; its lines go to the run's log and to `take`. Its exit code."""
    log = get_run_logger()
    process = _start(command, root, environment)
    _running.add(process)
    try:
        assert process.stdout
        for raw in process.stdout:
            if line := redact(raw.rstrip()):
                log.info(line)
                take(line)
        return process.wait()
    finally:
        _kill(process)
        _running.discard(process)


def _start(command: list[str], root: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    programs = Path(sys.executable).parent
    quiet = {"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    quiet |= {"DVC_NO_ANALYTICS": "true"}
    return subprocess.Popen(
        [str(programs / command[0]), *command[1:]],
        cwd=root,
        env=os.environ | quiet | {"RLHF_FLOW_PID": str(os.getpid())} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[str]) -> None:
    processes.stop_groups([process.pid])
    process.wait()


def _progress(stage: str, line: str) -> Progress:
    match = PROGRESS.fullmatch(line)
    if match and match["stage"] == stage:
        return Progress(stage, "running", match["metrics"], int(match["step"]), int(match["total"]))
    return Progress(stage, "running", line)
