"""The quality of the embedded default, seed by seed and in the arithmetic of other machines: fresh clones of HEAD run the whole pipeline.

python bench/learning/seeds.py                                 seeds 1, 2 and 3: about ten minutes on two cores
python bench/learning/seeds.py --seeds 1-10                    ten of them
python bench/learning/seeds.py --arithmetic all --together 2   three seeds in each arithmetic, two runs at a time (seconds then say nothing)
python bench/learning/seeds.py --seeds 1 --repeat              and again with `dvc repro` in a second clone: are all bytes the same?
python bench/learning/seeds.py ppo.steps=30                    with changed values
python bench/learning/seeds.py --preset sandbox-function       right answers as reward, and no reward model

A result that hangs on rounding is luck, and threads, instruction sets and precisions round differently: they stand in for other
processors. `failed` names the gates that would refuse the model. Peak memory is the largest sum, over all processes of a run, of their PSS
(a page that several share is counted once).
"""

from __future__ import annotations

import json
import math
import operator
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, Clone, cell, evaluation, machine
from rlhf import config
from rlhf.registry import gates

Bounds = dict[str, tuple[str, Any]]
BOUNDS: dict[str, Bounds] = {  # by preset
    "sandbox": {
        "reward_accuracy": ("≥", 0.88),
        "ci95_low": ("≥", 0.25),
        "win_rate": ("≥", 0.75),
        "perplexity_ratio": ("≤", 1.15),
        "failed": ("is", "none"),
    },
    "sandbox-function": {
        "accuracy": ("≥", 0.9),
        "accuracy_low": ("≥", 0.15),
        "perplexity_ratio": ("≤", 1.15),
        "reward_model": ("is", "none"),
        "failed": ("is", "none"),
    },
}
MEDIAN_REWARD_ACCURACY = 0.91
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {"≥": operator.ge, "≤": operator.le, "is": operator.eq}
TRAINING = ("base", "sft", "reward", "awac", "ppo", "grpo", "dpo", "answers", "best_of_n", "rrhf", "round", "iterative", "evaluate")
# name → values of params.yaml, and environment
ARITHMETICS: dict[str, tuple[list[str], dict[str, str]]] = {
    "as it is": ([], {}),
    "1 thread": ([f"launch.jobs.{stage}.threads=1" for stage in TRAINING], {}),
    "2 threads": ([f"launch.jobs.{stage}.threads=2" for stage in TRAINING], {}),
    "avx2": ([], {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}),
    "avx512": ([], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512", "ATEN_CPU_CAPABILITY": "avx512"}),
    "bf16": (["launch.precision=bf16"], {}),
}

Row = dict[str, Any]


def measure(clone: Clone, preset: str, seed: int, arithmetic: str, values: list[str]) -> Row:
    """Run the flow with a seed in an arithmetic; what its evaluation measured."""
    own, environment = ARITHMETICS[arithmetic]
    clone.environment |= environment
    clone.run("rlhf", "use", preset, f"seed={seed}", *own, *values)
    seconds, peak = clone.run("rlhf", "run")
    params = config.load(clone.root / "params.yaml")
    checked = gates.check(gates.read_metrics(clone.root), params, None)
    return {
        "arithmetic": arithmetic,
        "seed": seed,
        **evaluation(clone.root, params.policy),
        "reward_model": "trained" if (clone.root / "models/reward").exists() else "none",
        "failed": ", ".join(gate.name for gate in checked if not gate.passed) or "none",
        "seconds": seconds,
        "peak_gib": peak,
        "sha256": clone.hashes()[f"models/{params.policy}/model.safetensors"][:12],
    }


def holds(row: Row, name: str, bounds: Bounds) -> bool:
    if name not in bounds:
        return True
    sign, bound = bounds[name]
    return COMPARISONS[sign](row[name], bound)


def table(rows: list[Row], preset: str) -> Table:
    """One line a run; what misses its bound, which stands in the heading, is marked."""
    bounds = BOUNDS[preset]
    drawn = Table(title=f"{preset}, seed by seed", title_justify="left")
    for name in rows[0]:
        heading = name.replace("_", "\n", 1)
        drawn.add_column(heading + "\n{} {}".format(*bounds[name]) if name in bounds else heading, justify="right")
    for row in rows:
        drawn.add_row(*(cell(value) if holds(row, name, bounds) else f"[red]✗ {cell(value)}[/red]" for name, value in row.items()))
    return drawn


def repeated(first: Clone, second: Clone, preset: str, seed: int, values: list[str]) -> dict[str, bool]:
    """For each model, and for dvc.lock: whether `dvc repro` in a second clone gives what the flow gave in the first."""
    second.run("rlhf", "use", preset, f"seed={seed}", *values)
    second.run("dvc", "repro")
    one, other = first.hashes(), second.hashes()
    return {name: one.get(name) == other.get(name) for name in sorted(one | other)}


def numbers_of(seeds: str) -> list[int]:
    """1,2,5-7 → 1, 2, 5, 6, 7.

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        parts = [part.partition("-") for part in seeds.split(",")]
        return [seed for first, _, last in parts for seed in range(int(first), int(last or first) + 1)]
    except ValueError:
        raise typer.BadParameter(f"--seeds {seeds}: give whole numbers, for example 1,2,5-7") from None


def main(
    values: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to change in the preset.")] = None,
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(BOUNDS)}.")] = "sandbox",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them, or a range: 1,2,5-7.")] = "1-3",
    arithmetic: Annotated[list[str], typer.Option(help=f"all, or some of: {', '.join(ARITHMETICS)}.")] = ["as it is"],  # noqa: B006 — typer's own way
    together: Annotated[int, typer.Option(min=1, help="So many runs at a time.")] = 1,
    repeat: Annotated[bool, typer.Option("--repeat", help="Run the first seed again, by `dvc repro`, and compare all bytes.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the clones.")] = False,
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = REPOSITORY / "bench" / "seeds.json",
) -> None:
    """Run a preset for each seed and check its quality. Exit code 1: a run failed, a bound is missed or bytes differ."""
    numbers = numbers_of(seeds)
    chosen = list(ARITHMETICS) if "all" in arithmetic else arithmetic
    if unknown := set(chosen) - ARITHMETICS.keys():
        raise typer.BadParameter(f"no such arithmetic: {', '.join(sorted(unknown))}")
    if preset not in BOUNDS:
        raise typer.BadParameter(f"--preset {preset}: one of {', '.join(BOUNDS)}")
    bounds = BOUNDS[preset]
    console = Console(width=None if sys.stdout.isatty() else 200)
    with ExitStack() as afterwards:
        place = Path(tempfile.mkdtemp(prefix="rlhf-seeds-"))
        if keep:
            console.print(f"clones: {place}")
        else:
            afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        clones = {(name, seed): Clone(place / name.replace(" ", "-") / str(seed)) for name in chosen for seed in numbers}
        second = Clone(place / "repeat") if repeat else None  # now: HEAD may move in half an hour

        def one(key: tuple[str, int]) -> Row:
            row = measure(clones[key], preset, key[1], key[0], values or [])
            found = ", ".join(f"{name} {cell(row[name])}" for name in bounds)
            console.print(f"{row['arithmetic']}, seed {row['seed']}: {found}, {row['seconds']:.0f} s")
            return row

        with ThreadPoolExecutor(together) as runs:
            rows = list(runs.map(one, clones))
        first = clones[chosen[0], numbers[0]]
        same = repeated(first, second, preset, numbers[0], values or []) if second else {}
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=first.root, capture_output=True, text=True, check=True)
    console.print(table(rows, preset))
    accuracies = [row["reward_accuracy"] for row in rows if "reward_accuracy" in row]
    median = statistics.median(accuracies) if accuracies else math.inf
    if accuracies:
        console.print(f"median reward accuracy {median:.3f} (≥ {MEDIAN_REWARD_ACCURACY})")
    for name, equal in same.items():
        console.print(f"{name}: {'the same' if equal else '[red]✗ not the same[/red]'} by `dvc repro` in a second clone")
    report = {
        "revision": revision.stdout.strip(),
        "machine": machine(),
        "preset": preset,
        "values": values or [],
        "seeds": rows,
        "same": same,
    }
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if median < MEDIAN_REWARD_ACCURACY or not all([*same.values(), *(holds(row, name, bounds) for row in rows for name in row)]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
