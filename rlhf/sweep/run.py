"""Runs the tasks of a sweep: shared stages first, each once, then the points, so many side by side as are allowed.

One process, without threads: it starts `dvc repro` in the points' workspaces and looks after it. What is finished stands in files, so that
it can be killed at any moment and started again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rlhf.errors import UserError
from rlhf.launcher import processes
from rlhf.sweep import tasks
from rlhf.sweep.places import cache_of
from rlhf.sweep.points import Point
from rlhf.sweep.state import DONE, FAILED, Result, Say, State
from rlhf.sweep.tasks import Task
from rlhf.tracking import SweepRuns
from rlhf.workspace import snapshot

TRIES = 3  # of what the system killed, or what has lost a connection
SECONDS_BETWEEN_LOOKS = 0.2
SUMMARY = "metrics/summary.json"


class Runner:
    """Brings points to their ends.

    Args:
        root: the user's workspace.
        state: of the sweep.
        name: of the sweep.
        runs: in MLflow.
        jobs: how many tasks run side by side.
        numbers: of a point, that a line tells.
        say: takes lines for people.
        ended: called after each point.
    """

    def __init__(
        self, root: Path, state: State, name: str, runs: SweepRuns, jobs: int, numbers: Iterable[str], say: Say, ended: Callable[[], None]
    ) -> None:
        self._root, self._state, self._name, self._runs = root, state, name, runs
        self._jobs, self._numbers, self._say, self._ended = jobs, tuple(numbers), say, ended
        self._began = state.begin()
        self._cache: Path | None = None
        self._running: list[Task] = []
        self._shared: set[str] = set()  # keys of shared stages that are done; DVC knows of earlier runs

    def run(self, points: Sequence[tuple[Point, Result]]) -> None:
        """Bring open points to their ends; a failed one does not end the others.

        Raises:
            UserError: this is no DVC repository.
            Stopped: by a signal; what was under way is stopped, and goes on from its checkpoint the next time.
        """
        if not points:
            return
        self._runs.begin()
        self._cache = self._cache or cache_of(self._root)
        waiting = tasks.of(points, self._root, self._name, self._began["revision"], self._shared)
        try:
            while waiting or self._running:
                open_keys = {task.key for task in (*waiting, *self._running) if task.stage}
                ready = [task for task in waiting if not task.after & open_keys]
                for task in ready[: self._jobs - len(self._running)]:
                    waiting.remove(task)
                    self._start(task)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for task in [task for task in self._running if task.process and task.process.poll() is not None]:
                    self._look(task, waiting)
        finally:
            processes.stop_groups([task.process.pid for task in self._running if task.process])

    def _start(self, task: Task) -> None:
        if not task.stage:
            point, result = task.results[0]
            self._runs.open(result.number, result.name, point.values)
        assert self._cache
        task.began = time.monotonic()
        task.tries += 1
        task.ready(self._cache)
        self._state.log(task.place.folder.name).write_bytes(b"")
        self._say(f"{task.name}: {self._what(task)}")
        self._running.append(task)
        self._step(task)

    def _what(self, task: Task) -> str:
        if task.stage:
            return f"shared by {len(task.results)} points"
        return ", ".join(f"{key} {value}" for key, value in task.point.values.items())

    def _step(self, task: Task) -> None:
        number = 0 if task.stage else task.results[0][1].number
        environment = {"RLHF_FLOW_RUN_ID": self._runs.record(number)} | ({} if task.stage else {"DVC_EXP_NAME": task.name})
        task.start(self._state.log(task.place.folder.name), environment)

    def _look(self, task: Task, waiting: list[Task]) -> None:
        """One of its commands has ended."""
        assert task.process
        if not task.process.returncode and task.commands:
            self._step(task)
            return
        self._running.remove(task)
        if not task.process.returncode:
            try:
                self._finish(task)
            except (OSError, ValueError, UserError) as error:
                self._fail(task, f"its numbers could not be kept: {error}", waiting)
            return
        why, lasting = tasks.failure(self._state.log(task.place.folder.name))
        was_killed = task.process.returncode < 0  # dvc itself was
        if (was_killed or not lasting) and task.tries < TRIES:
            self._say(f"{task.name}: {why}: tried again")
            waiting.insert(0, task)
            return
        self._fail(task, why, waiting)

    def _finish(self, task: Task) -> None:
        seconds = task.seconds(self._state, self._root)
        took = f"{time.monotonic() - task.began:.0f} s"
        if task.stage:
            self._shared.add(task.key)
            self._say(f"{task.name}: done in {took}")
        else:
            _, result = task.results[0]
            metrics = json.loads((task.place.workspace / SUMMARY).read_text(encoding="utf-8"))
            if lacking := [name for name in self._numbers if name not in metrics]:
                raise ValueError(f"{SUMMARY} has no {lacking[0]}, an objective of the sweep")
            self._keep_experiment(task)
            self._save(replace(result, state=DONE, metrics=metrics, seconds=seconds, error=""))
            told = ", ".join(f"{name} {metrics[name]:.4g}" for name in self._numbers if name in metrics)
            self._say(f"{task.name}: done in {took}: {told}")
        task.place.remove()

    def _keep_experiment(self, task: Task) -> None:
        """Have the point as a DVC experiment of the commit that the sweep began on: DVC finds these by their references alone."""
        head = self._began["head"]
        reference = f"{snapshot.experiments(head)}/{task.name}"
        message = f"{self._state.title}: {self._what(task)}"
        snapshot.publish(task.place.workspace, head, message, self._root, reference)

    def _fail(self, task: Task, why: str, waiting: list[Task]) -> None:
        self._say(f"{task.name}: failed: {why}")
        for point, result in task.results:
            of_point = next((other for other in waiting if not other.stage and other.results[0][0] is point), None)
            if of_point or not task.stage:
                self._save(replace(result, state=FAILED, error=why))
            if of_point:
                waiting.remove(of_point)
        # what was to be shared among points that are all gone by now
        left = {point.key for other in waiting if not other.stage for point, _ in other.results}
        waiting[:] = [other for other in waiting if not other.stage or any(point.key in left for point, _ in other.results)]

    def _save(self, result: Result) -> None:
        sent = self._runs.finish(result.number, result.name, result.values, result.metrics or {}, result.error)
        self._state.save(replace(result, sent=sent))
        self._ended()
