"""What a warm start from earlier answers saves: new data after a first version, and the answers sampled until its gold score is reached.

python bench/learning/warm_start.py                            grpo, seeds 1 to 5
python bench/learning/warm_start.py --seeds 1 awac.epochs=2    with changed values of stage awac or of what follows

In each clone a first version is trained and registered. Then rows are added to pairs and prompts, and the policy is trained again, once
from sft and once with stage awac before it. The gold score is that of each step's answers, a mean over WINDOW steps; that of the first
version is what its evaluation found. A run that never comes there counts with all that it sampled.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from bench.clone import REPOSITORY, Clone, cell, evaluation, machine
from bench.learning.seeds import ARITHMETICS, numbers_of
from rlhf import config
from tests.stage_runs import table as rows_of

ALGORITHM = "grpo"
NEW_DATA = ("data.sources.2.rows=12000", "data.sources.3.rows=5000")  # 10000 pairs and 4000 prompts before
VARIANTS = {"without": "awac.versions=0", "with": "awac.versions=1"}
WINDOW = 5


def measure(clone: Clone, seed: int, own: list[str], values: list[str]) -> dict[str, Any]:
    """A first version, then both ways to the next; what each took to reach the first one's gold score."""
    if not (clone.root / "first.json").exists():
        clone.run("rlhf", "use", "sandbox", f"seed={seed}", f"algorithm={ALGORITHM}", *own)
        clone.run("rlhf", "run")
        (clone.root / "first.json").write_text(json.dumps(evaluation(clone.root, ALGORITHM)), encoding="utf-8")
    first = json.loads((clone.root / "first.json").read_text(encoding="utf-8"))["gold"]
    row: dict[str, Any] = {"seed": seed, "first": first}
    for name, versions in VARIANTS.items():
        clone.run("rlhf", "use", "sandbox", f"seed={seed}", f"algorithm={ALGORITHM}", *own, *NEW_DATA, versions, *values)
        clone.run("dvc", "repro", "evaluate")
        found = evaluation(clone.root, ALGORITHM)
        row |= {f"answers_{name}": answers_until(clone.root, first), f"start_{name}": gold(clone.root)[0]}
        row |= {f"{measured}_{name}": found[measured] for measured in ("gold", "kl", "perplexity_ratio")}
    row["effective_sample_size"] = json.loads((clone.root / "metrics/awac.json").read_text(encoding="utf-8"))["effective_sample_size"]
    return row


def gold(root: Path) -> list[float]:
    """Gold score of the answers of each step, as a mean over it and those before it in the window."""
    scores = [float(row["gold"]) for row in rows_of(root / "plots/gold_against_kl.csv")]
    return [statistics.fmean(scores[max(0, step - WINDOW) : step]) for step in range(1, len(scores) + 1)]


def answers_until(root: Path, score: float) -> int:
    """Answers that were sampled until the gold score was reached; all of them where it was not."""
    params = config.load(root / "params.yaml").grpo
    steps = next((step for step, found in enumerate(gold(root), start=1) if step >= WINDOW and found >= score), params.steps)
    return steps * params.rollout_batch_size


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean of paired differences, and the ends of its 95 % interval (Student's t)."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def drawn(title: str, rows: list[dict[str, Any]]) -> Table:
    """One line a row."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", "\n", 1), justify="right")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    return table


def main(
    values: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to change in the second training.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them, or a range: 1,2,5-7.")] = "1-5",
    arithmetic: Annotated[str, typer.Option(help=f"One of: {', '.join(ARITHMETICS)}.")] = "1 thread",
    clones: Annotated[
        Path | None, typer.Option(help="Where the clones are, or are to be left: stages that are there need not run again.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = REPOSITORY / "bench" / "warm_start.json",
) -> None:
    """Train a second version with and without a warm start. Exit code 1: with it no fewer answers are needed, by the interval."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    own, environment = ARITHMETICS[arithmetic]
    rows: list[dict[str, Any]] = []
    with ExitStack() as afterwards:
        place = clones or Path(tempfile.mkdtemp(prefix="rlhf-warm-start-"))
        if not clones:
            afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        for seed in numbers_of(seeds):
            clone = Clone(place / str(seed))
            clone.environment |= environment
            rows.append(measure(clone, seed, own, values or []))
            console.print(", ".join(f"{name} {cell(value)}" for name, value in rows[-1].items()))
    console.print(drawn("a second version, with and without a warm start", rows))
    mean, low, high = interval([row["answers_without"] - row["answers_with"] for row in rows])
    console.print(f"answers spared: {mean:.0f} ({low:.0f} to {high:.0f})")
    output.write_text(json.dumps({"machine": machine(), "arithmetic": arithmetic, "values": values, "rows": rows}, indent=2) + "\n")
    if not low > 0:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
