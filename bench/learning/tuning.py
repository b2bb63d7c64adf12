"""What a bandit makes of values that are off (ULTHO): PPO with fixed values and with values that are chosen while it learns.

python bench/learning/tuning.py                     every start, fixed and chosen, with seeds 1 to 5
python bench/learning/tuning.py slow --seeds 1      the learning rate a quarter of the good one
python bench/learning/tuning.py --only fixed        the values as they stand

Each start has the values of the preset sandbox but for one that is off by a factor of 4. Chosen means that learning rate and KL
coefficient can become a quarter or four times of what they were. Exit code 1: from a start that is off, what was chosen comes out more than
NEAR below the good values as they stand, as a mean over seeds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, Clone, cell, evaluation, machine
from bench.learning.seeds import ARITHMETICS, numbers_of

NEAR = 0.03
VALUES = ("fixed", "chosen")
# peak learning rate of the actor, and KL coefficient
STARTS = {"good": (3e-4, 0.1), "slow": (7.5e-5, 0.1), "fast": (1.2e-3, 0.1), "loose": (3e-4, 0.025), "tight": (3e-4, 0.4)}
MEASURED = ("gold", "ci95_low", "win_rate", "kl", "perplexity_ratio")


def values_of(start: str, *, chosen: bool) -> list[str]:
    rate, kl = STARTS[start]
    clusters = f"{{learning_rate_factor: [1.0, 0.25, 4.0], kl_coefficient: [{kl}, {kl / 4}, {kl * 4}]}}"
    bandit = f"ppo.ultho={{clusters: {clusters}, kl_weight: 0.0, window: 10, exploration: 3.0}}"
    return [f"ppo.actor.learning_rate={rate}", f"ppo.kl.coefficient={kl}", *([bandit] if chosen else [])]


def means(rows: list[dict[str, Any]]) -> Table:
    """One line a start, fixed or chosen."""
    drawn = Table(title="PPO on the sandbox, means over seeds", title_justify="left")
    for name in ("start", "values", *MEASURED, "gold − good's"):
        drawn.add_column(name, justify="left" if name in ("start", "values") else "right")
    for start, values in dict.fromkeys((row["start"], row["values"]) for row in rows):
        own = [row for row in rows if (row["start"], row["values"]) == (start, values)]
        distance = below_good(rows, start, values)
        shown = (statistics.fmean(row[name] for row in own) for name in MEASURED)
        drawn.add_row(start, values, *map(cell, shown), "" if distance is None else cell(distance))
    return drawn


def below_good(rows: list[dict[str, Any]], start: str, values: str) -> float | None:
    """Gold above that of the good values as they stand (below: negative), over the seeds of both."""
    good = {row["seed"]: row["gold"] for row in rows if (row["start"], row["values"]) == ("good", "fixed")}
    own = [row["gold"] - good[row["seed"]] for row in rows if (row["start"], row["values"]) == (start, values) and row["seed"] in good]
    return statistics.fmean(own) if own else None


def main(
    starts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(STARTS)}; all where none is named.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them, or a range: 1,2,5-7.")] = "1-5",
    only: Annotated[str | None, typer.Option(help=f"One of: {', '.join(VALUES)}; both where none is named.")] = None,
    steps: Annotated[int, typer.Option(help="Of PPO: a bandit needs some.")] = 60,
    arithmetic: Annotated[str, typer.Option(help=f"One of: {', '.join(ARITHMETICS)}.")] = "1 thread",
    clones: Annotated[
        Path | None, typer.Option(help="Where the clones are, or are to be left: stages that are there need not run again.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = REPOSITORY / "bench" / "tuning.json",
) -> None:
    """Train the sandbox's policy from good values and from ones that are off, fixed and chosen, and print the gold scores."""
    names = starts or list(STARTS)
    if unknown := [name for name in names if name not in STARTS]:
        raise typer.BadParameter(f"unknown start {', '.join(unknown)}: one of {', '.join(STARTS)}")
    if only and only not in VALUES:
        raise typer.BadParameter(f"{only}: one of {', '.join(VALUES)}", param_hint="--only")
    console = Console(width=None if sys.stdout.isatty() else 160)
    own, environment = ARITHMETICS[arithmetic]
    rows: list[dict[str, Any]] = []
    with ExitStack() as afterwards:
        place = clones or Path(tempfile.mkdtemp(prefix="rlhf-tuning-"))
        if not clones:
            afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        for seed in numbers_of(seeds):
            clone = Clone(place / str(seed))
            clone.environment |= environment
            for start, values in ((start, values) for start in names for values in VALUES if only in (None, values)):
                changes = values_of(start, chosen=values == "chosen")
                clone.run("rlhf", "use", "sandbox", f"seed={seed}", *own, f"ppo.steps={steps}", *changes)
                clone.run("dvc", "repro", "evaluate")
                rows.append({"start": start, "values": values, "seed": seed, **evaluation(clone.root)})
                console.print(f"{start}, {values}, seed {seed}: gold {rows[-1]['gold_sft']:.3f} → {rows[-1]['gold']:.3f}")
    console.print(means(rows))
    output.write_text(json.dumps({"machine": machine(), "arithmetic": arithmetic, "steps": steps, "rows": rows}, indent=2) + "\n")
    if any((below_good(rows, start, "chosen") or 0) < -NEAR for start in names if start != "good"):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
