"""What each part of PPO is worth: the stages before it once a seed, then PPO and evaluation once a variant.

python bench/learning/ablations.py                             every variant with seed 1
python bench/learning/ablations.py --seeds 1,2,3 one four      one update per rollout against four, three seeds
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
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, Clone, cell, evaluation, machine

# name → the values that differ from the preset sandbox
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "no-whitening": ["ppo.whiten_advantages=false"],
    "no-value-clip": ["ppo.value_clip=null"],
    "no-mixture": ["ppo.mixture_coefficient=0"],
    "lora": ["ppo.actor_lora={rank: 16, alpha: 32.0, targets: all-linear, learning_rate: 1.0e-3}"],
    "one": ["ppo.mini_batch_size=64"],
    # four updates of a rollout, each a quarter as far; Adam's averages reach as many rollouts back (β to the power of 1/4)
    "four": ["ppo.mini_batch_size=64", "ppo.epochs=4", "ppo.actor.learning_rate=7.5e-5", "ppo.actor.betas=[0.974, 0.987]"],
    "four-fast": ["ppo.mini_batch_size=64", "ppo.epochs=4"],  # each as far as the one
    "four-parts": ["ppo.mini_batch_size=16"],  # each on a quarter of it
    "ema": ["ppo.ema_decay=0.9"],
}
COLUMNS = ("gold_sft", "gold", "gold_difference", "ci95_low", "win_rate", "kl", "perplexity_sft", "perplexity_ratio", "eos_rate")


def main(
    variants: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(VARIANTS)}; all where none is named.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "1",
    clones: Annotated[
        Path | None, typer.Option(help="What `bench/learning/seeds.py --keep` left: its stages before PPO need not run again.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = REPOSITORY / "bench" / "ablations.json",
) -> None:
    """Run PPO on the sandbox with one part changed at a time, and print gold score, win rate and perplexity of each."""
    names = variants or list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"unknown variant {', '.join(unknown)}: one of {', '.join(VARIANTS)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows: list[dict[str, Any]] = []
    with ExitStack() as afterwards:
        place = clones or Path(tempfile.mkdtemp(prefix="rlhf-ablations-"))
        if not clones:
            afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        for seed in map(int, seeds.split(",")):
            clone = Clone(place / str(seed))
            for name in names:
                clone.run("rlhf", "use", "sandbox", f"seed={seed}", *VARIANTS[name])
                # DVC knows which stages the change leaves as they were
                seconds, _ = clone.run("dvc", "repro", "evaluate")
                rows.append({"variant": name, "seed": seed, **evaluation(clone.root)})
                console.print(f"{name}, seed {seed}: {seconds:.0f} s, gold {rows[-1]['gold_sft']:.3f} → {rows[-1]['gold']:.3f}")
    console.print(table(rows))
    output.write_text(json.dumps({"machine": machine(), "values": VARIANTS, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> Table:
    drawn = Table(title="PPO on the sandbox, one part changed at a time", title_justify="left")
    for name in ("variant", "seed", *COLUMNS):
        drawn.add_column(name.replace("_", "\n", 1), justify="left" if name == "variant" else "right")
    for row in rows:
        drawn.add_row(row["variant"], *(cell(row[name]) for name in ("seed", *COLUMNS)))
    return drawn


if __name__ == "__main__":
    typer.run(main)
