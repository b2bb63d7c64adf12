"""What each algorithm makes of the same models, data and number of answers: the stages before it once a seed, then its own and evaluate.

python bench/learning/algorithms.py                            ppo, and four without a critic, with seeds 1 to 3
python bench/learning/algorithms.py all --seeds 1              every algorithm
python bench/learning/algorithms.py ppo dpo best-of-n rrhf iterative one-round --answers 3840   at equal answers; gold by round
python bench/learning/algorithms.py gspo --clones DIR grpo.kl.coefficient=0.01   with changed values, in the clones of a run before

Each has the values that `rlhf use sandbox algorithm=NAME` writes; one-round is iterative with as many answers in one round. Seconds are
those of `dvc repro` of its own stages alone, start and end included; memory as in seeds.py. Exit code 1: one of BOUNDED has a mean gold
score that falls further than NEAR below ppo's.
"""

from __future__ import annotations

import csv
import json
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, Clone, cell, evaluation, machine
from bench.learning.seeds import ARITHMETICS, numbers_of
from rlhf import config
from rlhf.config.algorithms import NAMES
from rlhf.registry import gates

BOUNDED = ("rloo", "grpo", "dr-grpo", "reinforce++-baseline")
NEAR = 0.03
ONE_ROUND = "one-round"
KNOWN = (*NAMES, ONE_ROUND)
BEFORE = ("prepare", "base", "sft", "reward")
MEASURED = ("gold_sft", "gold", "ci95_low", "ci95_high", "win_rate", "kl", "answer_tokens", "eos_rate", "perplexity_ratio")

Row = dict[str, Any]


def measure(clone: Clone, algorithm: str, seed: int, own: list[str], values: list[str], count: int | None) -> Row:
    """Train by an algorithm, and evaluate; what came of it, and what its stages cost.

    Args:
        count: how many answers it is to learn from; None: as many as its values say.
    """
    clone.run("rlhf", "use", "sandbox", f"seed={seed}", *own, *chosen(algorithm), *values)
    if count:
        clone.run("rlhf", "use", "params.yaml", *at_equal_answers(config.load(clone.root / "params.yaml"), count))
    params = config.load(clone.root / "params.yaml")
    stages = [stage for stage in params.stages if stage not in (*BEFORE, "evaluate")]
    clone.run("dvc", "repro", *(stage for stage in params.stages if stage in BEFORE))
    before = processor_seconds()
    seconds, peak = clone.run("dvc", "repro", "--force", "--single-item", *stages)
    used = processor_seconds() - before
    clone.run("dvc", "repro", "evaluate")
    found = evaluation(clone.root, params.policy)
    checked = gates.check(gates.read_metrics(clone.root), params, None)
    return {
        "algorithm": algorithm,
        "seed": seed,
        "answers": sampled(clone.root, params),
        **{name: found[name] for name in MEASURED},
        "failed": ", ".join(gate.name for gate in checked if not gate.passed) or "none",
        "seconds": seconds,
        "processor_seconds": used,
        "peak_gib": peak,
        "gold_by_round": by_round(clone.root) if params.policy == "iterative" else [],
    }


def chosen(algorithm: str) -> list[str]:
    """The values that choose it."""
    return ["algorithm=iterative", "iterative.rounds=1"] if algorithm == ONE_ROUND else [f"algorithm={algorithm}"]


def at_equal_answers(params: config.Params, count: int) -> list[str]:
    """Values by which an algorithm learns from so many answers of its own, as nearly as its batches allow."""
    each = params.answers.answers_per_temperature * len(params.answers.temperatures)
    return [
        f"ppo.steps={round(count / params.ppo.rollout_batch_size)}",
        f"grpo.steps={round(count / params.grpo.rollout_batch_size)}",
        f"answers.prompts={round(count / each / params.rounds)}",
    ]


def by_round(root: Path) -> list[float]:
    """Mean gold score of each round's policy on the prompts kept apart, sft's first."""
    with (root / "plots" / "gold_against_kl.csv").open(encoding="utf-8", newline="") as file:
        return [float(row["gold"]) for row in csv.DictReader(file)]


def drawn(scores: Iterable[float]) -> str:
    """Scores in one cell of a table."""
    return " ".join(map(cell, scores))


def processor_seconds() -> float:
    """What all commands that have ended took, their children's included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sampled(root: Path, params: config.Params) -> int:
    """How many answers were sampled: those of groups that were replaced, and the likeliest ones, as well."""
    if params.policy == "ppo":
        return params.ppo.steps * params.ppo.rollout_batch_size
    if params.policy == "dpo":  # it learns from the data's pairs
        return 0
    if params.policy not in ("ppo", "grpo"):
        names = [stage for stage in params.stages if config.kind(stage) == "answers"]
        return sum(json.loads((root / "metrics" / f"{name}.json").read_text(encoding="utf-8"))["answers"] for name in names)
    groups = json.loads((root / "metrics" / "grpo.json").read_text(encoding="utf-8"))["groups"]
    return groups * (params.grpo.answers_per_prompt + (params.grpo.baseline == "greedy"))


def table(rows: list[Row]) -> Table:
    found = Table(title="sandbox, by algorithm and seed", title_justify="left")
    for name in rows[0]:
        found.add_column(name.replace("_", "\n", 1), justify="left" if name == "algorithm" else "right")
    for row in rows:
        found.add_row(*(drawn(value) if isinstance(value, list) else cell(value) for value in row.values()))
    return found


def behind(rows: list[Row], algorithm: str) -> float | None:
    """How far its gold score is above ppo's (below: negative), as a mean over the seeds that both ran with."""
    gold = {(row["algorithm"], row["seed"]): row["gold"] for row in rows}
    found = [value - gold["ppo", seed] for (name, seed), value in gold.items() if name == algorithm and ("ppo", seed) in gold]
    return statistics.fmean(found) if found else None


def means(rows: list[Row]) -> Table:
    """One line an algorithm; what misses its bound is marked."""
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    columns = ("answers", *MEASURED, "seconds", "processor_seconds", "peak_gib")
    found = Table(title=f"means over seeds; {', '.join(BOUNDED)}: at most {NEAR} below ppo", title_justify="left")
    for heading in ("algorithm", "gold − ppo's", *columns, "gold_by_round"):
        found.add_column(heading.replace("_", "\n", 1), justify="left" if heading == "algorithm" else "right")
    for name in names:
        distance = behind(rows, name)
        shown = "" if distance is None else cell(distance)
        of_all = [[row[column] for row in rows if row["algorithm"] == name] for column in columns]
        course = zip(*(row["gold_by_round"] for row in rows if row["algorithm"] == name), strict=False)  # as far as all seeds came
        marked = f"[red]✗ {shown}[/red]" if misses(rows, name) else shown
        found.add_row(name, marked, *(cell(statistics.fmean(one)) for one in of_all), drawn(map(statistics.fmean, course)))
    return found


def misses(rows: list[Row], algorithm: str) -> bool:
    distance = behind(rows, algorithm)
    return algorithm in BOUNDED and distance is not None and distance < -NEAR


def main(
    words: Annotated[list[str] | None, typer.Argument(metavar="[NAME | KEY=VALUE]…", help=f"all, or some of {', '.join(KNOWN)}.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them, or a range: 1,2,5-7.")] = "1-3",
    answers: Annotated[int | None, typer.Option(min=64, help="Have each learn from so many answers of its own.")] = None,
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
                rows.append(measure(clone, name, seed, own, values, answers))
                found = rows[-1]
                console.print(f"{name}, seed {seed}: {found['seconds']:.0f} s, gold {found['gold_sft']:.3f} → {found['gold']:.3f}")
    console.print(table(rows))
    console.print(means(rows))
    output.write_text(
        json.dumps({"machine": machine(), "arithmetic": arithmetic, "values": values, "answers": answers, "rows": rows}, indent=2) + "\n"
    )
    if any(misses(rows, name) for name in names):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
