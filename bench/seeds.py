"""The quality of the embedded default, seed by seed: a fresh clone of HEAD runs the whole pipeline, and every bound is checked.

python bench/seeds.py                      seeds 1, 2 and 3: about half an hour on two cores
python bench/seeds.py --seeds 1 --repeat   and again with `dvc repro` in a second clone: are all bytes the same?
python bench/seeds.py ppo.steps=30         with changed values

Peak memory is the largest sum, over all processes of a run, of their PSS (a page that several share is counted once).
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS_BETWEEN_SAMPLES = 0.5
LINES_SHOWN = 20
BOUNDS = {
    "reward_accuracy": ("≥", 0.85),
    "gold_difference": ("≥", 0.25),
    "ci95_low": (">", 0.0),
    "win_rate": ("≥", 0.75),
    "perplexity_ratio": ("≤", 1.15),
}
COMPARISONS = {"≥": operator.ge, ">": operator.gt, "≤": operator.le}

Row = dict[str, Any]


class Clone:
    """The repository at HEAD in a folder of its own. Its commands use this interpreter's packages and the clone's code."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "clone", folder / "log.txt"
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_", "RLHF_"))}
        self.environment = outside | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "PREFECT_HOME": str(folder / "prefect"),
            "DVC_SITE_CACHE_DIR": str(folder / "dvc"),
            "DO_NOT_TRACK": "true",
        }
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(self.root)], check=True)

    def run(self, *words: str) -> tuple[float, float]:
        """Run a command to its end; its seconds and its peak memory in GiB.

        Raises:
            typer.Exit: it failed; its last lines are shown.
        """
        started, peak = time.perf_counter(), 0
        with self.log.open("ab") as log:
            process = subprocess.Popen(words, cwd=self.root, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                time.sleep(SECONDS_BETWEEN_SAMPLES)
        if process.returncode:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
            print("\n".join([*lines, f"`{' '.join(words)}` failed with exit code {process.returncode}"]), file=sys.stderr)
            raise typer.Exit(1)
        return time.perf_counter() - started, peak / 2**30

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights of every model and of the entries of dvc.lock, by path."""
        weights = {str(path.relative_to(self.root)): path.read_bytes() for path in sorted(self.root.glob("models/*/model.safetensors"))}
        # stages that ran side by side stand in dvc.lock in the order in which they ended
        locked = json.dumps(yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8")), sort_keys=True)
        return {name: hashlib.sha256(content).hexdigest() for name, content in (weights | {"dvc.lock": locked.encode()}).items()}


def memory(pid: int) -> int:
    """Bytes that a process and all its descendants hold."""
    parent = psutil.Process(pid)
    total = 0
    for process in (parent, *parent.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended meanwhile
    return total


def measure(clone: Clone, seed: int, values: list[str]) -> Row:
    """Run the flow with a seed; what its evaluation measured."""
    clone.run("rlhf", "use", "sandbox", f"seed={seed}", *values)
    seconds, peak = clone.run("rlhf", "run")
    found = json.loads((clone.root / "metrics" / "evaluate.json").read_text(encoding="utf-8"))
    gold = found["gold"]
    return {
        "seed": seed,
        "reward_accuracy": found["reward_model"]["accuracy"],
        "gold_sft": gold["sft"],
        "gold_ppo": gold["ppo"],
        "gold_difference": gold["difference"],
        "ci95_low": gold["ci95"][0],
        "ci95_high": gold["ci95"][1],
        "win_rate": found["win_rate"]["value"],
        "perplexity_ratio": found["perplexity"]["ratio"],
        "kl": found["kl"],
        "eos_rate": found["eos_rate"]["ppo"],
        "answer_tokens": found["answer_tokens"]["ppo"],
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
        drawn.add_row(*(_cell(value) if holds(row, name) else f"[red]✗ {_cell(value)}[/red]" for name, value in row.items()))
    return drawn


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)[:12]


def repeated(first: Clone, seed: int, values: list[str], folder: Path) -> dict[str, bool]:
    """For each model, and for dvc.lock: whether `dvc repro` in a second clone gives what the flow gave in the first."""
    second = Clone(folder)
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
        rows = []
        for seed, clone in clones.items():
            rows.append(measure(clone, seed, values or []))
            console.print(f"seed {seed}: {rows[-1]['seconds']:.0f} s")
        same = repeated(clones[numbers[0]], numbers[0], values or [], place / "repeat") if repeat else {}
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clones[numbers[0]].root, capture_output=True, text=True, check=True)
    console.print(table(rows))
    for name, equal in same.items():
        console.print(f"{name}: {'the same' if equal else '[red]✗ not the same[/red]'} by `dvc repro` in a second clone")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report = {"revision": revision.stdout.strip(), "machine": machine, "values": values or [], "seeds": rows, "same": same}
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not all([*same.values(), *(holds(row, name) for row in rows for name in row)]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
