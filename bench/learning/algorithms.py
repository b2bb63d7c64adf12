"""What each algorithm makes of the same models, data and number of answers: the stages before it once a seed, then its own and evaluate.

python bench/learning/algorithms.py                            ppo, and four without a critic, with seeds 1 to 3
python bench/learning/algorithms.py all --seeds 1              every algorithm that learns from its own answers
python bench/learning/algorithms.py gspo --clones DIR grpo.kl.coefficient=0.01   with changed values, in the clones of a run before

Each has the values that `rlhf use sandbox algorithm=NAME` writes. Seconds are those of `dvc repro` of its stage alone, start and end
included; memory as in seeds.py. Exit code 1: one of BOUNDED has a mean gold score that falls further than NEAR below ppo's.
"""

from __future__ import annotations

import json
import resource
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
from rlhf import config
from rlhf.config.algorithms import NAMES, policy_stage
from rlhf.registry import gates

BOUNDED = ("rloo", "grpo", "dr-grpo", "reinforce++-baseline")
NEAR = 0.03
KNOWN = tuple(name for name in NAMES if name != "dpo")  # which learns from pairs, not from answers
MEASURED = ("gold_sft", "gold", "ci95_low", "ci95_high", "win_rate", "kl", "answer_tokens", "eos_rate", "perplexity_ratio")

Row = dict[str, Any]


def measure(clone: Clone, algorithm: str, seed: int, own: list[str], values: list[str]) -> Row:
    """Train by an algorithm, and evaluate; what came of it, and what its stage cost."""
    stage = policy_stage(algorithm)
    clone.run("rlhf", "use", "sandbox", f"seed={seed}", *own, f"algorithm={algorithm}", *values)
    clone.run("dvc", "repro", "sft", "reward")
    before = processor_seconds()
    seconds, peak = clone.run("dvc", "repro", "--force", "--single-item", stage)
    used = processor_seconds() - before
    clone.run("dvc", "repro", "evaluate")
    found = evaluation(clone.root, stage)
    params = config.load(clone.root / "params.yaml")
    checked = gates.check(gates.read_metrics(clone.root), params, None)
    return {
        "algorithm": algorithm,
        "seed": seed,
        "answers": answers(clone.root, params),
        **{name: found[name] for name in MEASURED},
        "failed": ", ".join(gate.name for gate in checked if not gate.passed) or "none",
        "seconds": seconds,
        "processor_seconds": used,
        "peak_gib": peak,
    }


def processor_seconds() -> float:
    """What all commands that have ended took, their children's included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def answers(root: Path, params: config.Params) -> int:
    """How many answers were sampled: those of groups that were replaced, and the likeliest ones, as well."""
    if params.policy == "ppo":
        return params.ppo.steps * params.ppo.rollout_batch_size
    groups = json.loads((root / "metrics" / "grpo.json").read_text(encoding="utf-8"))["groups"]
    return groups * (params.grpo.answers_per_prompt + (params.grpo.baseline == "greedy"))


def table(rows: list[Row]) -> Table:
    drawn = Table(title="sandbox, by algorithm and seed", title_justify="left")
    for name in rows[0]:
        drawn.add_column(name.replace("_", "\n", 1), justify="left" if name == "algorithm" else "right")
    for row in rows:
        drawn.add_row(*map(cell, row.values()))
    return drawn


def behind(rows: list[Row], algorithm: str) -> float | None:
    """How far its gold score is above ppo's (below: negative), as a mean over the seeds that both ran with."""
    gold = {(row["algorithm"], row["seed"]): row["gold"] for row in rows}
    found = [value - gold["ppo", seed] for (name, seed), value in gold.items() if name == algorithm and ("ppo", seed) in gold]
    return statistics.fmean(found) if found else None


def means(rows: list[Row]) -> Table:
    """One line an algorithm; what misses its bound is marked."""
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    columns = ("answers", *MEASURED, "seconds", "processor_seconds", "peak_gib")
    drawn = Table(title=f"means over seeds; {', '.join(BOUNDED)}: at most {NEAR} below ppo", title_justify="left")
    for heading in ("algorithm", "gold − ppo's", *columns):
        drawn.add_column(heading.replace("_", "\n", 1), justify="left" if heading == "algorithm" else "right")
    for name in names:
        distance = behind(rows, name)
        shown = "" if distance is None else cell(distance)
        of_all = [[row[column] for row in rows if row["algorithm"] == name] for column in columns]
        drawn.add_row(name, f"[red]✗ {shown}[/red]" if misses(rows, name) else shown, *(cell(statistics.fmean(one)) for one in of_all))
    return drawn


def misses(rows: list[Row], algorithm: str) -> bool:
    distance = behind(rows, algorithm)
    return algorithm in BOUNDED and distance is not None and distance < -NEAR


def main(
    words: Annotated[list[str] | None, typer.Argument(metavar="[NAME | KEY=VALUE]…", help=f"all, or some of {', '.join(KNOWN)}.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them, or a range: 1,2,5-7.")] = "1-3",
    arithmetic: Annotated[str, typer.Option(help=f"One of: {', '.join(ARITHMETICS)}.")] = "1 thread",
    clones: Annotated[
        Path | None, typer.Option(help="Where the clones are, or are to be left: stages that are there need not run again.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = REPOSITORY / "bench" / "algorithms.json",
) -> None:
    """Train the sandbox's sft policy by each algorithm, and print what came of it."""
    values = [word for word in words or [] if "=" in word]
    named = [word for word in words or [] if "=" not in word] or ["ppo", *BOUNDED]
    names = list(KNOWN) if "all" in named else named
    if unknown := [name for name in names if name not in KNOWN]:
        raise typer.BadParameter(f"unknown algorithm {', '.join(unknown)}: one of {', '.join(KNOWN)}")
    if arithmetic not in ARITHMETICS:
        raise typer.BadParameter(f"--arithmetic {arithmetic}: one of {', '.join(ARITHMETICS)}")
    console = Console(width=None if sys.stdout.isatty() else 220)
    own, environment = ARITHMETICS[arithmetic]
    rows: list[Row] = []
    with ExitStack() as afterwards:
        place = clones or Path(tempfile.mkdtemp(prefix="rlhf-algorithms-"))
        if not clones:
            afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        for seed in numbers_of(seeds):
            clone = Clone(place / str(seed))
            clone.environment |= environment
            for name in names:
                rows.append(measure(clone, name, seed, own, values))
                found = rows[-1]
                console.print(f"{name}, seed {seed}: {found['seconds']:.0f} s, gold {found['gold_sft']:.3f} → {found['gold']:.3f}")
    console.print(table(rows))
    console.print(means(rows))
    output.write_text(json.dumps({"machine": machine(), "arithmetic": arithmetic, "values": values, "rows": rows}, indent=2) + "\n")
    if any(misses(rows, name) for name in names):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
