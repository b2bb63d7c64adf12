"""Models that must not come into service: one trained on flipped preferences, and one that pleases the reward model only.

python bench/learning/refusals.py                  a good champion first, then both: about ten minutes on two cores
python bench/learning/refusals.py --clones DIR     on what `bench/learning/seeds.py --keep` left of seed 1: its stages need not run again
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, Clone, cell, evaluation, machine

# name → the values that differ from the preset sandbox
WORSE: dict[str, list[str]] = {
    "flipped preferences": ["data.sources.2.label_noise=1"],
    "β = 0, many epochs": [
        *("ppo.kl.coefficient=0", "ppo.mixture_coefficient=0", "ppo.steps=90", "ppo.epochs=4", "ppo.max_approx_kl=1"),
        *("ppo.policy_clip=[0.5, 0.5]", "ppo.actor.schedule=constant", "ppo.stop={kl: 10000.0, score: 10000.0}"),
    ],
}
COLUMNS = ("gold_sft", "gold", "ci95_low", "win_rate", "reward_accuracy", "kl", "perplexity_ratio", "eos_rate")


def main(
    clones: Annotated[Path | None, typer.Option(help="What `bench/learning/seeds.py --keep` left.")] = None,
    output: Annotated[Path, typer.Option(help="Where to write the findings.")] = REPOSITORY / "bench" / "refusals.json",
) -> None:
    """Run the flow for a good model, then for worse ones. Exit code 1: one of these was not refused, or the champion moved."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows: list[dict[str, Any]] = []
    with ExitStack() as afterwards:
        place = clones or Path(tempfile.mkdtemp(prefix="rlhf-refusals-"))
        if not clones:
            afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        clone = Clone(place / "1" if clones else place)
        for name, values in {"as it is": [], **WORSE}.items():
            clone.run("rlhf", "use", "sandbox", *values)
            seconds, _ = clone.run("rlhf", "run")
            rows.append({"model": name, **registered(clone), **evaluation(clone.root)})
            console.print(f"{name}: {seconds:.0f} s, version {rows[-1]['version']}, gates {rows[-1]['gates']}", markup=False)
    console.print(table(rows))
    output.write_text(json.dumps({"machine": machine(), "values": WORSE, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if not all(row["champion"] == rows[0]["version"] and row["gates"].startswith("failed: ") for row in rows[1:]):
        raise typer.Exit(1)


def registered(clone: Clone) -> dict[str, Any]:
    """The newest version, what its gates said, and the champion."""
    client = MlflowClient(f"sqlite:///{clone.root}/mlruns/mlflow.db")
    newest = max(client.search_model_versions("name = 'assistant'"), key=lambda version: int(version.version))
    champion = client.get_model_version_by_alias("assistant", "champion")
    return {"version": int(newest.version), "gates": newest.tags["gates"], "champion": int(champion.version)}


def table(rows: list[dict[str, Any]]) -> Table:
    drawn = Table(title="worse models", title_justify="left")
    for name in ("model", *COLUMNS, "gates", "champion"):
        drawn.add_column(name.replace("_", "\n", 1))
    for row in rows:
        drawn.add_row(row["model"], *(cell(row[name]) for name in COLUMNS), row["gates"], str(row["champion"]))
    return drawn


if __name__ == "__main__":
    typer.run(main)
