"""Stages sft, reward and dpo against TRL's trainers on the same pairs: what both know of held-out ones.

    rlhf use smollm2-135m-hh data.sources.0.path=FILE && rlhf run          in a clone; with algorithm=dpo for stage dpo
    python bench/real_model/peers.py CLONE                                 the stages whose models are there
    python bench/real_model/peers.py CLONE reward --steps 2                a try: TRL's trainer stops after two steps

On a GPU where there is one, unless params.yaml says launch.accelerator: cpu.

TRL's trainers begin with the same weights (and head), and have the same rows in the same order, batches, epochs, rate, schedule and
optimiser, in bf16 by autocast on fp32 weights. Measured are, on the held-out pairs: the reward model's accuracy, the accuracy of dpo's
implicit reward, and sft's loss of a token of the preferred answers. What still differs: TRL's reward model and dpo see a dialogue with
what the template puts behind its last end token (a line break), ours end with that token. The difference's interval is over pairs, and
knows nothing of the luck of a training run: give clones of several seeds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from bench.clone import cell
from bench.speed.sides import free_port, place_of
from bench.speed.training import SETTINGS
from bench.speed.workload import job_in, load_plain
from rlhf import config
from rlhf.engine.distributed import device, layout, micro_batches, start
from rlhf.engine.order import Order
from rlhf.engine.setup import learning_rate_factor, parameter_groups
from rlhf.job import Job, read_lines
from rlhf.launcher.command import find_gpus
from rlhf.models.dialogues import encode_dialogues
from rlhf.models.policy import load_policy
from rlhf.models.scalar import ScalarModel, initialise_head, load_scalar
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import dpo, evaluate, reward, sft

BEFORE = {"sft": "base", "reward": "base", "dpo": "sft"}  # whose weights a stage begins with


def main(
    clone: Annotated[Path, typer.Argument(help="A workspace in which the stages have run.")],
    stages: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(BEFORE)}; all that have run where none is named.")] = None,
    steps: Annotated[int, typer.Option(help="Stop TRL's trainers after so many steps; 0: at their end.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of TRL's trainers.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Train by TRL, and print what both sides know of held-out pairs."""
    names = stages or [name for name in BEFORE if (clone / "models" / name).exists()]
    where = "cuda" if find_gpus(config.load(clone / "params.yaml").launch.accelerator) else "cpu"
    os.environ |= {"DS_ACCELERATOR": where, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as the launcher has it
    rows = list[dict[str, Any]]()
    table = Table("", "held-out", "ours", "TRL's", "difference", "95%")
    with tempfile.TemporaryDirectory(prefix="rlhf-peers-") as place:
        for name in names:
            # a process of its own: TRL would take the group of ours
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
                other.submit(train, clone, name, Path(place) / name, steps, threads, where).result()
        os.environ |= place_of(0, 1, free_port())
        start(job_in(clone, "evaluate", where))
        for name in names:
            row = compared(job_in(clone, "evaluate", where), name, Path(place) / name)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            bounds = " … ".join(map(cell, row["ci95"]))
            table.add_row(name, row["measure"], *map(cell, (row["ours"], row["trl"], row["difference"])), bounds)
    Console(width=120).print(table)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- theirs


def rows_of(job: Job, tokenizer: Any, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage as TRL's trainers take them, those that are too long left out, in the order in which the stage takes them."""
    params = getattr(job.params, stage)
    if stage == "sft":
        fitting = [{"input_ids": ids, "assistant_masks": mask} for ids, mask in sft.read_rows(job, tokenizer)[0]]
    else:
        found = read_lines(job.input("data/prepared/reward.jsonl"))
        answers = [{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")} for row in found]
        rows = [{"prompt": row["prompt"], **sides} for row, sides in zip(found, answers, strict=True)]
        fitting = [row for row in rows if longest(tokenizer, row) <= params.max_tokens]
    order = Order(len(fitting), params.batch_size, job.seed("order"))
    return [fitting[i] for step in range(order.steps(params.epochs)) for i in order.batch(step)]


def longest(tokenizer: Any, row: dict[str, Any]) -> int:
    return max(len(ids) for ids, _ in encode_dialogues(tokenizer, [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]))


def train(root: Path, stage: str, to: Path, steps: int, threads: int, on: str) -> None:
    """Train by TRL's trainer of a stage, and save what comes out."""
    import trl
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    torch.set_num_threads(threads)
    job = job_in(root, stage)
    params, tokenizer = getattr(job.params, stage), load_tokenizer(root / "models" / BEFORE[stage])
    rows = rows_of(job, tokenizer, stage)
    total, settings = len(rows) // params.batch_size, params.optimizer
    model: Any = classifier(job, tokenizer) if stage == "reward" else load_plain(root / "models" / BEFORE[stage], "fp32")
    adam = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), settings.learning_rate, settings.betas, settings.epsilon, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: learning_rate_factor(settings, step, total))
    given: dict[str, Any] = SETTINGS | {
        "use_cpu": on == "cpu",
        "bf16": job.params.launch.precision == "bf16",
        "output_dir": str(to / "trl"),
        "per_device_train_batch_size": params.batch_size,
        "train_sampling_strategy": "sequential",
        "max_steps": min(total, steps or total),
        "max_grad_norm": settings.max_grad_norm,
        "max_length": None,
    }
    data = Dataset.from_list(rows)
    common: dict[str, Any] = {"processing_class": tokenizer, "optimizers": (adam, schedule)}
    if stage == "sft":
        trl.SFTTrainer(model, trl.SFTConfig(**given), None, data, **common).train()
    elif stage == "reward":
        trl.RewardTrainer(model, trl.RewardConfig(**given), None, data, **common).train()
    else:
        known = load_plain(root / "models/sft", "fp32")
        trl.DPOTrainer(model, known, trl.DPOConfig(**given, beta=params.beta), None, data, **common).train()
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def classifier(job: Job, tokenizer: Any) -> Any:
    """The base model with the head that stage reward begins with."""
    begun = load_scalar(job.input("models/base"), tokenizer, "fp32")
    initialise_head(begun, job.seed("head"))
    given = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForSequenceClassification.from_pretrained(job.input("models/base"), dtype=torch.float32, **given)
    with torch.no_grad():
        model.score.weight.copy_(begun.head.weight)
    return model


# ------------------------------------------------------------------------------------------------------------ comparison


def compared(job: Job, stage: str, theirs: Path) -> dict[str, Any]:
    """A number of both sides, and how far ours is above theirs (for a loss: below)."""
    measure, sign, of = MEASURES[stage]
    ours, other = of(job, job.root / "models" / stage), of(job, theirs)
    apart = sign * (ours - other)
    means = {"ours": float(ours.mean()), "trl": float(other.mean()), "difference": float(apart.mean())}
    if stage == "sft":
        means["before"] = float(of(job, job.root / "models/base").mean())
    return {"stage": stage, "measure": measure, "n": len(ours), **means, "ci95": evaluate.bootstrap(job, apart)}


def loaded(job: Job, folder: Path) -> Any:
    model: Any = load_policy(folder, job.params.launch.precision)
    return model.to(device(job))


def reward_right(job: Job, folder: Path) -> np.ndarray:
    tokenizer = load_tokenizer(folder)
    pairs, _ = reward.read_pairs(job, tokenizer, "data/prepared/heldout_pairs.jsonl", job.params.reward.max_tokens)
    model: ScalarModel = load_scalar(folder, tokenizer, job.params.launch.precision).to(device(job))
    return np.greater(*reward.score_pairs(model, pairs, layout(job).micro_batch_tokens)).astype(float)


def implicit_right(job: Job, folder: Path) -> np.ndarray:
    pairs, _ = dpo.read_pairs(job, load_tokenizer(folder), "data/prepared/heldout_pairs.jsonl")
    policy, known = (loaded(job, path) for path in (folder, job.root / "models/sft"))
    margins = dpo.implicit_margins(policy, known, pairs, job.params.dpo, layout(job).micro_batch_tokens)
    return (np.array(margins) > 0).astype(float)


def chosen_loss(job: Job, folder: Path) -> np.ndarray:
    """Of each held-out pair, the mean loss of a token of the preferred answer."""
    pairs, _ = dpo.read_pairs(job, load_tokenizer(folder), "data/prepared/heldout_pairs.jsonl")
    policy, losses = loaded(job, folder), []
    for part in micro_batches(list(enumerate(pairs)), lambda one: dpo.tokens_of_pair(one[1]), layout(job).micro_batch_tokens):
        found = dpo.log_probs_of(policy, [pair for _, pair in part])
        losses += [(number, -chosen / sum(pair[0][1])) for (number, pair), (chosen, _) in zip(part, found, strict=True)]
    return np.array([loss for _, loss in sorted(losses)])


MEASURES: dict[str, tuple[str, int, Callable[[Job, Path], np.ndarray]]] = {
    "sft": ("loss of a token", -1, chosen_loss),
    "reward": ("accuracy", 1, reward_right),
    "dpo": ("implicit accuracy", 1, implicit_right),
}


if __name__ == "__main__":
    typer.run(main)
