"""What a warm start from earlier answers saves: new data after a first version, and the answers sampled until its gold score is reached.

python bench/learning/warm_start.py                            seeds 1 to 5
python bench/learning/warm_start.py --seeds 1 awac.epochs=2    with changed values of stage awac or of what follows

In each clone a first version is trained by grpo, which leaves several answers to a prompt, and registered. People then compare its answers
to new prompts with sft's, in pairs; those are data, prompts are added, and the policy is trained again, by ppo: once from sft, once with
stage awac before it. Every other step's policy answers PROMPTS prompts of another seed, as the first version does, with the same random
numbers; the sandbox is so small that two thirds of these stand in a stage's data, too. A run that never comes to its gold score counts with
all that it sampled.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from bench import pairs
from bench.clone import REPOSITORY, Clone, cell, machine
from bench.learning.seeds import ARITHMETICS, numbers_of
from rlhf import config
from rlhf.data.sandbox import MIN_GOLD_GAP, gold_score, make_rows
from rlhf.feedback.sample import answers
from rlhf.models.policy import load_policy

FIRST, SECOND = "grpo", "ppo"
NEW_PROMPTS = "data.sources.3.rows=5000"  # 4000 before
VARIANTS = {"without": ("sft", "awac.versions=0"), "with": ("awac", "awac.versions=1")}
STEPS, EVERY = 30, 2
KEPT = (f"algorithm={SECOND}", f"{SECOND}.steps={STEPS}", f"{SECOND}.checkpoint_every={EVERY}", f"launch.checkpoints.keep={STEPS // EVERY}")
PROMPTS, DRAWN = 800, 100_003  # and the seed of these prompts
COMPARED, ASKED, NOISE = 2000, 100_005, 0.05  # prompts, their seed, and how often who compares errs
SECONDS_BETWEEN_LOOKS = 0.05


def measure(clone: Clone, seed: int, own: list[str], values: list[str]) -> dict[str, Any]:
    """A first version, then both ways to the next; what each took to reach the first one's gold score."""
    use = ("rlhf", "use", "sandbox", f"seed={seed}", *own)
    if not (clone.root / "first.json").exists():
        clone.run(*use, f"algorithm={FIRST}")
        clone.run("rlhf", "run")
        found = {"gold": gold(clone.root, FIRST), "pairs": compared(clone.root, FIRST, seed)}
        (clone.root / "first.json").write_text(json.dumps(found), encoding="utf-8")
    before = json.loads((clone.root / "first.json").read_text(encoding="utf-8"))
    first, source = before["gold"], pairs.source(clone.root.parent / "compared.jsonl", before["pairs"])
    row: dict[str, Any] = {"seed": seed, "first": first}
    for name, (start, *changes) in VARIANTS.items():
        clone.run(*use, NEW_PROMPTS, f"data.sources.4={source}", *KEPT, *changes, *values)
        clone.run("dvc", "repro", start, "reward")
        weights = clone.root.parent / f"weights-{name}"
        with linked(clone.root / "runs" / SECOND, weights):
            clone.run("dvc", "repro", "--force", "--single-item", SECOND)
        steps = range(EVERY, STEPS, EVERY)
        scores = [
            gold(clone.root, start),
            *(gold(clone.root, start, weights / f"{step}.pt") for step in steps),
            gold(clone.root, SECOND),
        ]
        row |= {f"answers_{name}": answers_until(clone.root, scores, first), f"start_{name}": scores[0], f"end_{name}": scores[-1]}
        row |= {f"kl_{name}": measured(clone.root, SECOND)["kl"], f"scores_{name}": scores}
    row["effective_sample_size"] = measured(clone.root, "awac")["effective_sample_size"]
    return row


def measured(root: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((root / f"metrics/{stage}.json").read_text(encoding="utf-8")))


def compared(root: Path, model: str, seed: int) -> list[dict[str, Any]]:
    """A version's answers to new prompts beside sft's, as pairs, where the gold score tells them apart."""
    rows, params, chance = make_rows("prompts", COMPARED, ASKED, 0.0), config.load(root / "params.yaml"), random.Random(seed)
    prompts = [row["prompt"] for row in rows]
    written = [answers(root / "models" / name, name, prompts, params, 1.0, 1) for name in (model, "sft")]
    found = []
    for row, *both in zip(rows, *written, strict=True):
        low, high = sorted((gold_score(row["gold"], said[0].text), said[0].text) for said in both)
        if high[0] - low[0] >= MIN_GOLD_GAP:
            chosen, rejected = (low, high) if chance.random() < NOISE else (high, low)
            found.append({"prompt": row["prompt"], "chosen": chosen[1], "rejected": rejected[1]})
    return found


@contextmanager
def linked(runs: Path, place: Path) -> Iterator[None]:
    """While a stage trains, give the weights of its checkpoints a second name: it deletes them in the end."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    over = threading.Event()

    def look() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            for seal in runs.glob("*/checkpoints/step-*/COMPLETE-0"):
                weights = place / f"{seal.parent.name.removeprefix('step-')}.pt"
                with suppress(FileExistsError, FileNotFoundError):  # it has one; the stage has just ended
                    os.link(seal.parent / "actor/mp_rank_00_model_states.pt", weights)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def gold(root: Path, model: str, weights: Path | None = None) -> float:
    """Mean gold score of a policy's answers to the prompts of another seed.

    Args:
        root: of the workspace.
        model: whose folder below models/.
        weights: of a checkpoint, in the place of the folder's.
    """
    rows = make_rows("prompts", PROMPTS, DRAWN, 0.0)
    with tempfile.TemporaryDirectory(prefix="rlhf-policy-") as place:
        folder = Path(place) / "model"
        shutil.copytree(root / "models" / model, folder)
        if weights:
            policy = load_policy(folder, "fp32")
            policy.load_state_dict(torch.load(weights, weights_only=False)["module"])
            policy.save_pretrained(folder)
        written = answers(folder, "policy", [row["prompt"] for row in rows], config.load(root / "params.yaml"), 1.0, 1)
    return statistics.fmean(gold_score(row["gold"], said[0].text) for row, said in zip(rows, written, strict=True))


def answers_until(root: Path, scores: Sequence[float], wanted: float) -> int:
    """Answers that were sampled until the gold score was reached; all of them where it was not."""
    first = next((number for number, score in enumerate(scores) if score >= wanted), len(scores) - 1)
    return first * EVERY * config.load(root / "params.yaml").ppo.rollout_batch_size


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
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    for name in names:
        table.add_column(name.replace("_", "\n", 1), justify="right")
    for row in rows:
        table.add_row(*(cell(row[name]) for name in names))
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
