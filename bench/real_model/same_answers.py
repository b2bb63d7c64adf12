"""Stage grpo and TRL's GRPOTrainer on the same answers: how far their weights end from each other, from whatever models a workspace has.

    rlhf use smollm2-135m-hh algorithm=grpo data.sources.0.path=FILE && rlhf run --until reward         in a clone
    python bench/real_model/same_answers.py CLONE grpo.steps=4 grpo.rollout_batch_size=16 grpo.mini_batch_size=8

Each of TRL's steps has the answers that ours has sampled, as bench/learning/peers.py --same-answers does with the sandbox; so what is left
is rewards, advantages, loss and optimiser. In fp32, one thread each; the seeds choose prompts and answers. The mixture of texts and the
early end of a step's updates, which TRL does not have, are off. `apart` is a share of the way that ours have come.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.clone import cell
from bench.learning.peers import ALGORITHMS, apart, trained
from bench.learning.seeds import numbers_of
from bench.speed.workload import NEVER
from rlhf.workspace import presets

WITHOUT = ("grpo.mixture_coefficient=0.0", f"grpo.max_approx_kl={NEVER}", f"grpo.checkpoint_every={NEVER}", "launch.precision=fp32")
READ = ("models/sft", "models/reward", "data/prepared")


def main(
    clone: Annotated[Path, typer.Argument(help="A workspace in which stages sft and reward have run.")],
    values: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes of its params.yaml.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them, or a range: 1,2,5-7.")] = "1-3",
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Train by both, and print how far they end from each other."""
    rows = []
    table = Table("seed", "steps", "answers of a step", "apart", "answers/s", "TRL's, given them")
    for seed in numbers_of(seeds):
        with tempfile.TemporaryDirectory(prefix="rlhf-peers-") as place:
            rows.append(row := beside(clone, Path(place), seed, values or []))
        print(json.dumps(row), file=sys.stderr, flush=True)
        speeds = (cell(row["speed"][side]) for side in ("ours", "peer"))
        table.add_row(str(seed), str(row["steps"]), str(row["answers"]), f"{row['apart']:.1e}", *speeds)
    Console(width=120).print(table)
    if output:
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def beside(clone: Path, root: Path, seed: int, values: list[str]) -> dict[str, Any]:
    """Train in a folder by both, from the models of a workspace."""
    changed, params = presets.with_values(
        (clone / "params.yaml").read_text(encoding="utf-8"), [f"seed={seed}", *WITHOUT, *values], "params.yaml"
    )
    assert params.algorithm in ALGORITHMS, f"algorithm is {params.algorithm}: TRL has {' and '.join(ALGORITHMS)}"
    for folder in READ:
        shutil.copytree(clone / folder, root / folder)
    (root / "params.yaml").write_text(changed, encoding="utf-8")
    speed = trained(root, params.algorithm, seed, same_answers=True)
    return {"seed": seed, "steps": params.grpo.steps, "answers": params.grpo.rollout_batch_size, "apart": apart(root), "speed": speed}


if __name__ == "__main__":
    typer.run(main)
