"""The fault table: real processes are killed, cut off, starved and interfered with; a rerun must end as if nothing had happened.

python bench/faults/run.py                       all cases, an hour or two on two cores
python bench/faults/run.py --only "SIGKILL dvc" --only Ctrl-C     some of them
python bench/faults/run.py --only "power cuts" --cuts 20

Each case plays in a copy of a workspace with a shrunken sandbox in which base and reward are done. The flow is started, the fault comes
in the middle of sft and in the middle of ppo, and what was stopped is started again. At the end stand the hashes of all models and of
dvc.lock of a run that nothing disturbed, each step once in MLflow, one version, one champion, no process and no lock.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, machine
from bench.faults.cases import CASES as BY_HAND
from bench.faults.disturbed import Bench, Row
from bench.faults.serve import CASES as SERVED
from bench.faults.versions import CASES as VERSIONS
from bench.faults.workspace import DISTURBED, LostError, Server, base_workspaces

CASES = BY_HAND | SERVED | VERSIONS


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Cases: {', '.join(CASES)}.")] = None,
    place: Annotated[Path | None, typer.Option(help="A folder to keep the prepared workspaces in, for the next time.")] = None,
    stages: Annotated[list[str], typer.Option(help="Where the fault comes.")] = [*DISTURBED],  # noqa: B006 — typer's own way
    cuts: Annotated[int, typer.Option(help="Power cuts of case `power`.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments of the power cuts.")] = 1,
    output: Annotated[Path, typer.Option(help="Where to write the table; cases that are not run keep their rows.")] = REPOSITORY
    / "bench"
    / "faults.json",
) -> None:
    """Play the cases and print the table. Exit code 1: one of them failed."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that everything is tidied up
    console = Console(width=None if sys.stdout.isatty() else 160)
    chosen = list(CASES) if not only else [name for name in CASES if name in only]
    if unknown := set(only or ()) - set(CASES):
        raise typer.BadParameter(f"no such case: {', '.join(sorted(unknown))}")
    folder = (place or Path(tempfile.mkdtemp(prefix="rlhf-faults-"))).resolve()
    rows: list[Row] = []
    try:
        before, done = base_workspaces(folder)
        server = Server("prefect", folder / "servers", before.environment)
        server.start()
        bench = Bench(folder / "cases", before, done, done.hashes(), server.address, stages, cuts, seed)
        try:
            for name in chosen:
                began = time.monotonic()
                rows += _play(bench, name)
                said = "; ".join(
                    f"{row.stage or name} {'passed' if row.passed else 'FAILED: ' + row.why}" for row in rows if row.case == name
                )
                console.print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", markup=False)
                _write(output, rows)
        finally:
            server.kill()
    finally:
        if place is None:
            shutil.rmtree(folder, ignore_errors=True)
    console.print(_table(rows))
    if not all(row.passed for row in rows):
        raise typer.Exit(1)


def _play(bench: Bench, name: str) -> list[Row]:
    rows: list[Row] = []
    try:
        rows = CASES[name](bench, name)
    except LostError as lost:
        rows = [Row(name, "", False, "", None, str(lost))]
    finally:  # also where the bench itself is stopped
        bench.tidy(keep=not rows or not all(row.passed for row in rows))
    return rows


def _write(output: Path, rows: list[Row]) -> None:
    known = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.exists() else []
    new = {row.case for row in rows}
    kept = [row for row in known if row["case"] not in new and row["case"] in CASES]
    order = list(CASES)
    table = sorted([*kept, *map(asdict, rows)], key=lambda row: order.index(row["case"]))
    output.write_text(json.dumps({"machine": machine(), "rows": table}, indent=2) + "\n", encoding="utf-8")


def _table(rows: list[Row]) -> Table:
    drawn = Table(title="faults", title_justify="left")
    for name in ("fault", "stage", "", "lost", "seconds to\nrecover", "what went wrong, or was skipped"):
        drawn.add_column(name)
    for row in rows:
        drawn.add_row(row.case, row.stage, row.verdict, row.lost, "" if row.seconds is None else f"{row.seconds:.1f}", row.why)
    return drawn


if __name__ == "__main__":
    typer.run(main)
