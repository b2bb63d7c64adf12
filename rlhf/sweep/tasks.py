"""What a sweep runs: a task for each stage that several open points share, and one for each point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.launcher import failures
from rlhf.redact import redact
from rlhf.sweep.places import Place
from rlhf.sweep.points import Point
from rlhf.sweep.state import Result, State
from rlhf.workspace.find import EXPERIMENTS, OF_SWEEP
from rlhf.workspace.fingerprint import LINEAGE

LAST_LINES = 12


@dataclass(eq=False)
class Task:
    """A stage that several points share, with those before it, or all stages of a point."""

    name: str
    point: Point  # whose values it runs with
    place: Place
    stage: str = ""  # the last to run; empty: all
    after: frozenset[str] = frozenset()  # keys of the shared stages that come first
    results: list[tuple[Point, Result]] = field(default_factory=list)  # of the points that wait for it
    tries: int = 0
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    commands: list[list[str]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Of its stage; empty for a point."""
        return self.point.stages[self.stage] if self.stage else ""

    def ready(self, cache: Path) -> None:
        """Have its workspace, and what is to be run there."""
        self.place.prepare(self.point, cache)
        data = sorted(path.relative_to(self.place.workspace) for path in self.place.workspace.glob("data/raw/*.dvc"))
        self.commands = [["dvc", "checkout", "--quiet", *map(str, data)]] if data else []
        self.commands.append(["dvc", "repro", *([self.stage] if self.stage else [])])

    def start(self, log: Path, environment: Mapping[str, str]) -> None:
        """Start the next of its commands, in a session of its own."""
        programs = Path(sys.executable).parent
        words = self.commands.pop(0)
        quiet = {"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        # DVC remembers files by their inodes: those of a workspace that goes need not be remembered
        quiet |= {"DVC_NO_ANALYTICS": "true", "DVC_SITE_CACHE_DIR": str(self.place.workspace / ".dvc" / "tmp" / "site")}
        # the code that the sweep began with, whatever the user changes meanwhile
        quiet["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.place.workspace), os.environ.get("PYTHONPATH")]))
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(programs / words[0]), *words[1:]],
                cwd=self.place.workspace,
                env=os.environ | quiet | {"RLHF_FLOW_PID": str(os.getpid()), **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.place.note(self.process.pid)

    def seconds(self, state: State, root: Path) -> float | None:
        """How long the steps of all its models' stages took, here or elsewhere; what is new is noted. None where none is known."""
        total = None
        for path in sorted(self.place.workspace.glob(f"models/*/{LINEAGE}")):
            lineage = json.loads(path.read_text(encoding="utf-8"))
            stage, fingerprint = lineage["stage"], lineage["fingerprint"]
            took = state.seconds(stage, fingerprint)
            if took is None:
                logs = [place / "runs" / stage / fingerprint / "metrics.jsonl" for place in (self.place.workspace, root)]
                took = next((taken(log) for log in logs if log.exists()), None)
                if took is not None:
                    state.add_seconds(stage, fingerprint, took)
            total = total if took is None else (total or 0.0) + took
        return total


def failure(log: Path) -> tuple[str, bool]:
    """Why a command failed, by its last lines, and whether it would fail again."""
    lines = [redact(line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-LAST_LINES:]
    told = [line for line in lines if not line.startswith(failures.FROM_DVC)]
    return failures.reason(told), failures.lasting(lines)


def of(points: Sequence[tuple[Point, Result]], root: Path, name: str, revision: str, done: set[str]) -> list[Task]:
    """The tasks of points that are open, each after those that it waits for.

    Args:
        points: with what is known of them.
        root: the user's workspace.
        name: of the sweep.
        revision: that the workspaces are checkouts of.
        done: keys of shared stages that are done.
    """
    folder = root / EXPERIMENTS / f"{OF_SWEEP}{name}"
    sharing: dict[str, list[tuple[Point, Result]]] = {}
    for point, result in points:
        for key in point.stages.values():
            sharing.setdefault(key, []).append((point, result))
    shared = {key: found for key, found in sharing.items() if len(found) > 1 and key not in done}
    tasks = []
    for key, found in shared.items():
        point = found[0][0]
        stage = next(stage for stage, own in point.stages.items() if own == key)
        before = frozenset(point.stages[other] for other in point.after[stage] if point.stages[other] in shared)
        tasks.append(Task(stage, point, Place(root, folder / f"{stage}-{key}", revision), stage, before, found))
    for point, result in points:
        before = frozenset(key for key in point.stages.values() if key in shared)
        place = Place(root, folder / f"{result.number}-{point.key}", revision)
        tasks.append(Task(result.name, point, place, "", before, [(point, result)]))
    return tasks


def taken(log: Path) -> float:
    """The seconds of all steps of a stage; of a step that was repeated after a kill, the last time."""
    steps: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # a kill has cut it off
        steps[entry["step"]] = float(entry.get("seconds", 0.0))
    return sum(steps.values())
