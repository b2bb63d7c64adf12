"""A sweep from its file to its report."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rlhf import plan
from rlhf.errors import UserError
from rlhf.locks import holder, lock
from rlhf.plan.findings import Findings
from rlhf.sweep import proposals, report
from rlhf.sweep.points import Maker, Point
from rlhf.sweep.run import Runner
from rlhf.sweep.space import Direction, Space, Values, load
from rlhf.sweep.state import DONE, FAILED, OPEN, Result, Say, State, write
from rlhf.tracking import SweepRuns
from rlhf.workspace import snapshot
from rlhf.workspace.find import refuse_experiment

READ = ("params.yaml", "dvc.yaml", "data/raw", "graphs", "rlhf")  # what points depend on
SHOWN = 3


@dataclass(frozen=True)
class Outcome:
    """What came of a sweep."""

    results: list[Result]
    order: list[Result]  # those that are done, the best by the first objective first
    wanted: dict[str, Direction]
    report: Path
    started: int  # how many points were open

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.state == FAILED]


def cancel(root: Path, file: Path) -> str:
    """Stop the sweep of a file that is under way, as Ctrl-C does; what was done, for people.

    Raises:
        UserError: the file is wrong, or no such sweep is under way.
    """
    space = load(file)
    pid = holder(root, _lock(space))
    if pid is None:
        raise UserError(f"sweep {space.name} is not under way in {root}", remedy=f"`rlhf sweep {file}` starts it, or goes on with it")
    os.kill(pid, signal.SIGTERM)
    return f"sweep {space.name} (process {pid}) was told to stop; `rlhf sweep {file}` goes on with it"


def sweep(root: Path, file: Path, jobs: int, say: Say, *, anew: bool = False, retry: bool = False) -> Outcome:
    """Run a sweep, or go on with it: what is finished is not done again.

    Args:
        root: the user's workspace.
        file: of the sweep.
        jobs: how many stages and points run side by side.
        say: takes lines for people.
        anew: forget what is known of it, and begin with the workspace as it stands.
        retry: try failed points once more.

    Raises:
        UserError: the file, a value, or the place is wrong, or this sweep is under way already.
        Stopped: by a signal.
    """
    refuse_experiment(root)
    space = load(file)
    if snapshot.head(root) is None:
        raise UserError(f"{root}: not a git repository with a commit, which experiments start from", remedy="`git init`, and commit once")
    with lock(root, _lock(space), refuse=f"sweep {space.name} is under way already"):
        one = Sweep(root, file, space, jobs, say)
        if anew:
            one.state.forget()
        return one.run(retry=retry)


def _lock(space: Space) -> str:
    return f"sweep-{space.name}"


class Sweep:
    """One sweep, whose lock is held.

    Args:
        root: the user's workspace.
        file: of the sweep.
        space: what stands there.
        jobs: how many tasks run side by side.
        say: takes lines for people.
    """

    def __init__(self, root: Path, file: Path, space: Space, jobs: int, say: Say) -> None:
        self._root, self._file, self._space, self._jobs, self._say = root, file, space, jobs, say
        self.state = State(root, space)
        self._results: dict[str, Result] = {}
        self._wanted: dict[str, Direction] = {}
        self._batches = self._proposed = 0

    def run(self, *, retry: bool) -> Outcome:
        """Bring all points to their ends."""
        is_new = not self.state.begun
        began = self.state.begin()
        if not is_new:
            self._tell_changes(began["revision"])
        with tempfile.TemporaryDirectory() as scratch:
            base = snapshot.checkout(self._root, began["revision"], Path(scratch) / "base")
            try:
                self._maker = Maker(base, self._root, self._space, self._file)
                points = self._plan()
                if is_new:
                    self._check(points)
            except UserError:
                if is_new:
                    self.state.forget()
                raise
            self._runs = SweepRuns(self._root, self._maker.params, began["record"], self._space.name, began["started"])
            runner = Runner(self._root, self.state, self._space.name, self._runs, self._jobs, self._wanted, self._say, self._draw)
            try:
                opened = self._bring(runner, points, retry=retry)
                while points := self._next_batch():
                    opened += self._bring(runner, points, retry=retry)
            except BaseException:
                if self._results:
                    self._runs.end("KILLED", self._about(), None)
                raise
        self._close(opened)
        return Outcome(self.results, report.order(self.results, self._wanted), self._wanted, self.state.report, opened)

    @property
    def results(self) -> list[Result]:
        return list(self._results.values())

    def _tell_changes(self, revision: str) -> None:
        changed = snapshot.differing(self._root, revision, snapshot.tree(self._root), *READ)
        if changed:
            names = ", ".join(line.partition(":")[0] for line in changed[:SHOWN])
            self._say(f"it goes on with the workspace as it was when it began; changed since: {names} (--anew begins with these)")

    def _plan(self) -> list[Point]:
        """Check the space, and all of its points that are known before anything runs: those of a grid, and random ones."""
        try:
            self._wanted = self._space.wanted(self._maker.params)
        except ValueError as error:
            raise UserError(f"{self._file}: {error}", remedy="take it out, or name another number of metrics/summary.json") from None
        if self._jobs > 1 and (port := self._maker.params.launch.port):
            raise UserError(
                f"launch.port is {port}, and --jobs {self._jobs}", remedy="let stages choose: `rlhf use params.yaml launch.port=0`"
            )
        if self._space.method == "grid":
            points, same = self._maker.grid()
            if same:
                self._say(f"{same} points of the grid are the same as others: no stage of theirs reads what differs")
            return points
        self._maker.corners()
        if self._space.method == "tpe":
            return []
        return [
            self._maker.make(values) for values in proposals.propose(self._space, self._wanted, [], self._space.points, lambda _: False)
        ]

    def _check(self, points: Sequence[Point]) -> None:
        """Look at what the stages will need, as `rlhf check` does, for each model and each algorithm that comes."""
        findings, seen = Findings(), set()
        for point in points or [self._maker.make(self._space.corners()[0])]:
            parts = point.params.model_dump(mode="json", include={"algorithm", "base", "data", "rewards", "launch"})
            if (what := json.dumps(parts, sort_keys=True)) not in seen:
                seen.add(what)
                found = plan.check(self._root, point.params, point.params.stages)
                findings.problems += [problem for problem in found.problems if problem not in findings.problems]
        findings.refuse()

    def _next_batch(self) -> list[Point]:
        """Points that are proposed by what came of the ones before; none where there are enough, or nothing new is found."""
        left = self._space.points - self._proposed
        if self._space.method != "tpe" or left <= 0:
            return []
        known = self.state.proposals()
        if self._batches < len(known):
            batch = known[self._batches]
        else:
            told = [(result.values, result.metrics) for result in self.results]
            batch = proposals.propose(self._space, self._wanted, told, min(self._space.batch, left), self._is_known)
            if batch:
                self.state.propose(batch)
        self._batches += 1
        self._proposed += len(batch)
        return [point for values in batch if (point := self._made(values))]

    def _made(self, values: Values) -> Point | None:
        """The point of proposed values; one that the schema refuses has failed."""
        try:
            return self._maker.make(values)
        except UserError as error:
            key = json.dumps(values, sort_keys=True)
            self._results[key] = self.state.save(replace(self.state.result(key, values), state=FAILED, error=error.what))
            return None

    def _is_known(self, values: Values) -> bool:
        try:
            return self._maker.make(values).key in self._results
        except UserError:
            return any(values == result.values for result in self.results)

    def _bring(self, runner: Runner, points: Sequence[Point], *, retry: bool) -> int:
        """Bring points to their ends; how many were open."""
        for point in points:
            result = self.state.result(point.key, point.values)
            if retry and result.state == FAILED:
                result = self.state.open_again(result)
            self._results[point.key] = result
        ready = [(point, self._results[point.key]) for point in points if self._results[point.key].state == OPEN]
        if ready:
            self._say(f"{len(points)} points, {len(points) - len(ready)} of them finished before")
            self.state.open()
        runner.run(ready)
        return len(ready)

    def _draw(self) -> None:
        """Write the report of what is known by now."""
        for key, result in self._results.items():
            self._results[key] = self.state.result(key, result.values)
        write(self.state.report, report.html(self._space, self.results, self._wanted, self._about()))

    def _about(self) -> str:
        began = self.state.begin()
        at = datetime.fromtimestamp(began["started"] / 1000).astimezone()
        return f"Begun {at:%Y-%m-%d %H:%M} on commit {began['head'][:8]}, with the workspace as it stood."

    def _close(self, opened: int) -> None:
        """Send what MLflow lacks, and the report, unless all of it is there."""
        self._draw()
        late = [result for result in self.results if result.state != OPEN and not result.sent]
        for result in late:
            sent = self._runs.finish(result.number, result.name, result.values, result.metrics or {}, result.error)
            self.state.save(replace(result, sent=sent))
        if opened or late or not self.state.closed:
            done = sum(result.state == DONE for result in self.results)
            note = f"{self._about()} {done} of {len(self.results)} points are done."
            if self._runs.end("FINISHED", note, self.state.report):
                self.state.close()
