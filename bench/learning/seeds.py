"""The quality of the embedded default, seed by seed: a fresh clone of HEAD runs the whole pipeline, and every bound is checked.

python bench/learning/seeds.py                      seeds 1, 2 and 3: about half an hour on two cores
python bench/learning/seeds.py --seeds 1 --repeat   and again with `dvc repro` in a second clone: are all bytes the same?
python bench/learning/seeds.py ppo.steps=30         with changed values

Peak memory is the largest sum, over all processes of a run, of their PSS (a page that several share is counted once).
"""

from __future__ import annotations

import json
import operator
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, Clone, cell, evaluation, machine

BOUNDS = {
    "reward_accuracy": ("≥", 0.85),
    "gold_difference": ("≥", 0.25),
    "ci95_low": (">", 0.0),
    "win_rate": ("≥", 0.75),
    "perplexity_ratio": ("≤", 1.15),
}
COMPARISONS = {"≥": operator.ge, ">": operator.gt, "≤": operator.le}

Row = dict[str, Any]


def measure(clone: Clone, seed: int, values: list[str]) -> Row:
    """Run the flow with a seed; what its evaluation measured."""
    clone.run("rlhf", "use", "sandbox", f"seed={seed}", *values)
    seconds, peak = clone.run("rlhf", "run")
    return {
        "seed": seed,
        **evaluation(clone.root),
        "seconds": seconds,
        "peak_gib": peak,
        "sha256": clone.hashes()["models/ppo/model.safetensors"],
    }


def holds(row: Row, name: str) -> bool:
    if name not in BOUNDS:
        return True
    sign, bound = BOUNDS[name]
    return COMPARISONS[sign](row[name], bound)


def table(rows: list[Row]) -> Table:
    """One line a seed; what misses its bound, which stands in the heading, is marked."""
    drawn = Table(title="sandbox, seed by seed", title_justify="left")
    for name in rows[0]:
        heading = name.replace("_", "\n", 1)
        drawn.add_column(heading + "\n{} {}".format(*BOUNDS[name]) if name in BOUNDS else heading, justify="right")
    for row in rows:
        drawn.add_row(*(cell(value) if holds(row, name) else f"[red]✗ {cell(value)}[/red]" for name, value in row.items()))
    return drawn


def repeated(first: Clone, second: Clone, seed: int, values: list[str]) -> dict[str, bool]:
    """For each model, and for dvc.lock: whether `dvc repro` in a second clone gives what the flow gave in the first."""
    second.run("rlhf", "use", "sandbox", f"seed={seed}", *values)
    second.run("dvc", "repro")
    one, other = first.hashes(), second.hashes()
    return {name: one.get(name) == other.get(name) for name in sorted(one | other)}


def main(
    values: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to change in the preset sandbox.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "1,2,3",
    repeat: Annotated[bool, typer.Option("--repeat", help="Run the first seed again, by `dvc repro`, and compare all bytes.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the clones.")] = False,
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = REPOSITORY / "bench" / "seeds.json",
) -> None:
    """Run the sandbox for each seed and check its quality. Exit code 1: a run failed, a bound is missed or bytes differ."""
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--seeds {seeds}: give whole numbers with commas between them, for example 1,2,3") from None
    console = Console(width=None if sys.stdout.isatty() else 160)
    with ExitStack() as afterwards:
        place = Path(tempfile.mkdtemp(prefix="rlhf-seeds-"))
        if keep:
            console.print(f"clones: {place}")
        else:
            afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        clones = {seed: Clone(place / str(seed)) for seed in numbers}
        second = Clone(place / "repeat") if repeat else None  # now: HEAD may move in half an hour
        rows = []
        for seed, clone in clones.items():
            rows.append(measure(clone, seed, values or []))
            console.print(f"seed {seed}: {rows[-1]['seconds']:.0f} s")
        same = repeated(clones[numbers[0]], second, numbers[0], values or []) if second else {}
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clones[numbers[0]].root, capture_output=True, text=True, check=True)
    console.print(table(rows))
    for name, equal in same.items():
        console.print(f"{name}: {'the same' if equal else '[red]✗ not the same[/red]'} by `dvc repro` in a second clone")
    report = {"revision": revision.stdout.strip(), "machine": machine(), "values": values or [], "seeds": rows, "same": same}
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not all([*same.values(), *(holds(row, name) for row in rows for name in row)]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
