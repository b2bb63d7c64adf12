"""What `rlhf run` shows while stages run: a bar for each on a terminal; elsewhere the flow's own log lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from rlhf.errors import UserError

NAME_WIDTH, BAR_WIDTH = 8, 20

if TYPE_CHECKING:
    from tasks.stage import Progress as Event


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show the stages of a flow that is imported and run inside this context."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)
    if not console.is_terminal:
        yield
        return
    # read by Prefect once, at its import: its log goes on to its server, and the terminal is for the bars
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from tasks import stage

    # a stage's lines are shown as they are: brackets in them are no markup, and the text alone gives way where the line is full
    text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    heading = TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=NAME_WIDTH))
    steps, clock = (column(table_column=Column(no_wrap=True, min_width=9)) for column in (MofNCompleteColumn, TimeElapsedColumn))
    bar = BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH))
    with Progress(heading, bar, steps, clock, text, console=console, expand=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=None, text="")
            running = event.state == "running"
            if event.total:
                bars.update(tasks[event.stage], completed=event.step, total=event.total)
            elif event.state in ("done", "up to date"):
                bars.update(tasks[event.stage], completed=1, total=1)
            bars.update(tasks[event.stage], text=event.text if running else event.state)

        stage.watch(update)
        yield


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.exc_info = None  # the message says what to mend
    return True
