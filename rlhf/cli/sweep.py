"""`rlhf sweep`: many points of a space of values, over the stages of the workspace's graph."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rlhf.errors import UserError
from rlhf.workspace.find import workspace

if TYPE_CHECKING:
    from rlhf.sweep.sweep import Outcome

SHOWN = 20  # points in the table on the terminal; the report has all


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="Which values are tried; docs/sweeps.md describes it.")],
    jobs: Annotated[int, typer.Option(min=1, help="How many stages and points run side by side.")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed points once more.")] = False,
    anew: Annotated[bool, typer.Option("--anew", help="Forget what is known of it, and begin with the workspace as it stands.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop it where it is under way, as Ctrl-C does.")] = False,
) -> None:
    """Try many values, sharing what does not change, in workspaces beside yours; started again, it goes on where it was.

    Each point becomes a DVC experiment, and an MLflow run below that of the sweep. Nothing is registered.
    """
    from rlhf.launcher import processes
    from rlhf.sweep import sweep as sweeps

    root, place = workspace(), file.resolve()
    file = place.relative_to(root) if place.is_relative_to(root) else place
    os.chdir(root)
    if cancel:
        print(sweeps.cancel(root, file))
        return
    try:
        with processes.stoppable():
            outcome = sweeps.sweep(root, file, jobs, _say, anew=anew, retry=retry)
    except processes.Stopped as stop:
        print(f"stopped by {stop}; `rlhf sweep {file}` goes on from there", file=sys.stderr)
        sys.exit(128 + stop.number)
    _show(outcome, root)
    if outcome.results and len(outcome.failed) == len(outcome.results):
        raise UserError("every point failed", remedy=f"mend the reason, then `rlhf sweep {file} --retry`")


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _show(outcome: Outcome, root: Path) -> None:
    """What came of it: the best points first, then those that failed, then what one does next."""
    if not outcome.started:
        print("nothing to do: every point is finished")
    keys = list(dict.fromkeys(key for result in outcome.results for key in result.values))
    numbers = list(dict.fromkeys([*outcome.wanted, "kl"]))
    table = Table("point", *keys, *numbers, "seconds", box=None)
    for result in outcome.order[:SHOWN]:
        cells = [f"{result.metrics[name]:.4g}" if result.metrics and name in result.metrics else "" for name in numbers]
        seconds = "" if result.seconds is None else f"{result.seconds:.0f}"
        table.add_row(result.name, *(str(result.values.get(key, "")) for key in keys), *cells, seconds)
    Console().print(table)
    for result in outcome.failed:
        print(f"failed: {result.name}: {result.error}")
    print(f"{len(outcome.order)} of {len(outcome.results)} points done, {len(outcome.failed)} failed")
    print(f"report: {outcome.report.relative_to(root)}")
    if outcome.order:
        print(f"next: `dvc exp show`; `dvc exp apply {outcome.order[0].name}` brings the best back, `rlhf run` then registers it")
