"""What `rlhf run` shows while stages run: a bar for each and one for all on a terminal; elsewhere the flow's own log lines."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from rlhf.errors import UserError

NAME_WIDTH, BAR_WIDTH = 8, 20
SECONDS_OF_SPEED = 120  # by which the time left is told
ALL = "all"
ENDED = ("done", "up to date")

if TYPE_CHECKING:
    from tasks.stage import Progress as Event


@contextmanager
def shown(console: Console, root: Path) -> Iterator[None]:
    """Show the stages of a flow that is imported and run inside this context."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)
    if not console.is_terminal:
        yield
        return
    # read by Prefect once, at its import: its log goes on to its server, and the terminal is for the bars
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    with _columns(console) as progress:
        bars = Bars(progress, root)
        from tasks import stage

        stage.watch(bars.update)
        try:
            yield
        except BaseException:
            bars.stop()
            raise


def _columns(console: Console) -> Progress:
    # a stage's lines are shown as they are: brackets in them are no markup, and the text alone gives way where the line is full
    text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    heading = TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=NAME_WIDTH))
    bar = BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH))
    steps = _Steps(table_column=Column(no_wrap=True, min_width=7, justify="right"))
    clock, left = (column(table_column=Column(no_wrap=True)) for column in (TimeElapsedColumn, TimeRemainingColumn))
    columns = (heading, bar, steps, clock, TextColumn("left"), left, text)
    return Progress(*columns, console=console, expand=True, refresh_per_second=4, speed_estimate_period=SECONDS_OF_SPEED)


class _Steps(ProgressColumn):
    """Steps of a stage; of all stages together the share that is done."""

    def render(self, task: Task) -> Text:
        if task.description == ALL:
            return Text(f"{task.percentage:.0f}%")
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.total and task.total > 1 else "")


class Bars:
    """A bar for each stage, in their order, below one for all. A stage counts as much as the seconds that it took the last time."""

    def __init__(self, progress: Progress, root: Path) -> None:
        self._progress, self._root = progress, root
        self._all = progress.add_task(ALL, total=1, text="starting")
        self._stages: dict[str, TaskID] = {}
        self._weights: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._states: dict[str, str] = {}

    def update(self, event: Event) -> None:
        """Take what happened to a stage."""
        name, state = event.stage, event.state
        if name not in self._stages:
            self._stages[name] = self._progress.add_task(name, start=False, total=1, text="")
            self._weights[name] = _seconds(self._root, name)
            self._shares[name] = 0.0
        bar = self._stages[name]
        if state == "running" and self._states.get(name) != "running":
            self._progress.start_task(bar)
        self._states[name] = state
        if event.total:
            self._progress.update(bar, completed=event.step, total=event.total)
            self._shares[name] = event.step / event.total
        elif state in ENDED:
            if not self._shares[name]:  # a stage that counts no steps
                self._progress.update(bar, completed=1)
            self._shares[name] = 1.0
        if state in (*ENDED, "stopped"):  # one that failed may be tried again
            self._progress.stop_task(bar)
        self._progress.update(bar, text=event.text if state == "running" else state)
        self._sum()

    def _sum(self) -> None:
        open_ones = [name for name, state in self._states.items() if state != "up to date"]
        done = sum(self._weights[name] * self._shares[name] for name in open_ones)
        total = sum(self._weights[name] for name in open_ones)
        ended = sum(state in ENDED for state in self._states.values())
        text = f"{ended} of {len(self._states)} stages"
        self._progress.update(self._all, completed=done if total else 1, total=total or 1, text=text)

    def stop(self) -> None:
        """Show what was under way as stopped."""
        for name, state in self._states.items():
            if state == "running":
                self._progress.update(self._stages[name], text="stopped")
                self._progress.stop_task(self._stages[name])
        self._progress.stop_task(self._all)


def _seconds(root: Path, stage: str) -> float:
    """How long a stage took the last time; a guess where none is known."""
    took = 10.0
    for path in sorted(root.glob(f"runs/{stage}/*/tracking.json"), key=lambda path: path.stat().st_mtime):
        with suppress(OSError, ValueError, TypeError, KeyError):
            record = json.loads(path.read_text(encoding="utf-8"))
            took = max(1.0, (record["ended"] - record["started"]) / 1000)
    return took


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.exc_info = None  # the message says what to mend
    return True
