"""A run with a fault in the middle of sft and of ppo, and what the table says of it (bench/faults/run.py)."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.faults.workspace import DISTURBED, LONGEST_STOP, PATIENCE, LostError, Server, Workspace, await_middle, until


@dataclass(frozen=True)
class Row:
    """A line of the table. `lost` says what had to be done twice; `seconds` is the time until the stage was at it again."""

    case: str
    stage: str
    passed: bool
    lost: str
    seconds: float | None
    why: str = ""
    skipped: bool = False

    @property
    def verdict(self) -> str:
        return "skipped" if self.skipped else "passed" if self.passed else "FAILED"


@dataclass
class Bench:
    """What the cases share."""

    folder: Path
    before: Workspace
    done: Workspace
    expected: dict[str, str]
    api: str
    stages: list[str]
    cuts: int
    seed: int
    servers: list[Server] = field(default_factory=list)
    mounted: list[Path] = field(default_factory=list)
    used: list[Workspace] = field(default_factory=list)

    def fresh(self, name: str) -> Workspace:
        """A copy of the prepared workspace; its flows use the server that the cases share."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        place = self.before.copy(self.folder / name)
        self.done.give_runs(place, [stage for stage in DISTURBED if stage not in self.stages])
        place.environment["PREFECT_API_URL"] = f"{self.api}/api"
        self.used.append(place)
        return place

    def server(self, kind: str, place: Workspace) -> Server:
        """A server for one case."""
        self.servers.append(Server(kind, place.folder / kind, place.environment))
        return self.servers[-1]

    def mount(self, path: Path) -> None:
        """Put a small disk of its own under a folder, with what is in there."""
        aside = path.with_name(f"{path.name}.aside")
        path.mkdir(exist_ok=True)
        path.rename(aside)
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], check=True)
        self.mounted.append(path)
        subprocess.run(["cp", "-a", f"{aside}/.", str(path)], check=True)
        shutil.rmtree(aside)

    def tidy(self, *, keep: bool) -> None:
        """End what a case has left, and delete its workspaces unless they are to be looked at."""
        for place in self.used:
            place.kill_all()
        for server in self.servers:
            server.kill()
        for path in self.mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        if not keep:
            for place in self.used:
                shutil.rmtree(place.folder, ignore_errors=True)
        self.used.clear()
        self.servers.clear()
        self.mounted.clear()


class Run:
    """`rlhf run` in a workspace, again and again until it comes to its end."""

    def __init__(self, place: Workspace, **environment: str) -> None:
        self.place, self._environment = place, environment
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.process = self.place.start("rlhf", "run", **self._environment)
        self.starts += 1

    def ended(self) -> bool:
        return self.process.poll() is not None

    def gone(self) -> None:
        """Wait until no process of it is left.

        Raises:
            LostError: some are left.
        """
        self.place.gone()

    def finish(self) -> list[str]:
        """Wait for its end; what is wrong with that."""
        until(self.ended, "the run does not end")
        return [] if self.process.returncode == 0 else [f"the last run ended with exit code {self.process.returncode}"]

    def close(self) -> list[str]:
        """What is left of it afterwards."""
        self.place.gone()
        return []


Inject = Callable[[Workspace, str, Run], None]


def disturbed(
    bench: Bench,
    name: str,
    inject: Inject,
    *,
    mend: Inject | None = None,
    stops: float = LONGEST_STOP,
    run: Run | None = None,
    uri: str | None = None,
) -> list[Row]:
    """Let the fault come in the middle of sft and of ppo, start again what it has stopped, and compare the end.

    Args:
        bench: what the cases share.
        name: of the case.
        inject: the fault.
        mend: what a person does about it before the next start, where one is needed.
        stops: the seconds in which the stage has to stop; 0: it goes on.
        run: a run under way; one in a fresh workspace where none is given.
        uri: of MLflow, where it is not the workspace's own.
    """
    run = run or Run(bench.fresh(name))
    place, found = run.place, []
    for stage in bench.stages:
        await_middle(place, stage, run.ended)
        (at, total), ranks, began = place.steps(stage), place.find("rank"), time.monotonic()
        inject(place, stage, run)
        if stops:
            _await_all(ranks, stops)
            at, _ = place.steps(stage)
        lines, stopped, restarted, repeated = place.lines(stage), "", 0.0, len(place.repeated)
        while place.lines(stage) <= lines and not place.has_locked(stage):
            if run.ended():
                run.gone()
                stopped = f"; all gone after {time.monotonic() - began:.1f} s"
                if mend:
                    mend(place, stage, run)
                restarted = time.time()
                run.start()
            if time.monotonic() - began > PATIENCE:
                raise LostError(f"{stage} does not go on")
            time.sleep(0.05)
        seconds = time.monotonic() - began
        lost = max(0, at - place.came_back_at(stage)) if stops or stopped else 0
        if stopped and place.finished(stage) < restarted:  # what had been trained was published
            lost = 0
        more = "".join(f" and all of {again}" for again in place.repeated[repeated:])
        found.append((stage, f"{lost} of {total} steps{more}{stopped}", seconds))
    wrong = run.finish() + run.close()
    wrong += place.problems(bench.expected, uri)
    return [Row(name, stage, not wrong, lost, seconds, "; ".join(wrong)) for stage, lost, seconds in found]


def _await_all(processes: list[psutil.Process], seconds: float) -> None:
    def lives(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return process.status() != psutil.STATUS_ZOMBIE
        return False

    until(lambda: not any(map(lives, processes)), "the ranks go on", seconds)
