"""Stages sft, reward and dpo against TRL's trainers on the same pairs: what both know of held-out ones.

    rlhf use smollm2-135m-hh data.sources.0.path=FILE && rlhf run          in a clone; with algorithm=dpo for stage dpo
    python bench/real_model/peers.py CLONE                                 the stages whose models are there
    python bench/real_model/peers.py CLONE reward --steps 2                a try: TRL's trainer stops after two steps
    python bench/real_model/peers.py CLONE dpo --alone                     what ours knows, without TRL

On a GPU where there is one, unless params.yaml says launch.accelerator: cpu.

TRL's trainers begin with the same weights (and head), and have the same rows as the same tokens in the same order, batches, epochs,
rate, schedule and optimiser; in bf16 by autocast on fp32 weights. Measured are, on the held-out pairs: the reward model's accuracy, the
accuracy of dpo's implicit reward, and sft's loss of a token of the preferred answers. `apart` is how far TRL's weights are from ours, as
a share of the way that ours have come: what rounding makes of it, in fp32 next to nothing. The difference's interval is over pairs.
"""

from __future__ import annotations

import json
import math
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
from transformers import AutoModel, AutoModelForSequenceClassification

from bench.clone import cell
from bench.speed.sides import free_port, place_of
from bench.speed.training import SETTINGS
from bench.speed.workload import job_in, load_plain
from rlhf import config
from rlhf.engine.distributed import device, layout, micro_batches, start
from rlhf.engine.order import Order
from rlhf.engine.setup import learning_rate_factor, parameter_groups
from rlhf.job import Job
from rlhf.launcher.command import find_gpus
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
    alone: Annotated[bool, typer.Option("--alone", help="Measure our models alone.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Train by TRL, and print what both sides know of held-out pairs."""
    names = stages or [name for name in BEFORE if (clone / "models" / name).exists()]
    where = "cuda" if find_gpus(config.load(clone / "params.yaml").launch.accelerator) else "cpu"
    os.environ |= {"DS_ACCELERATOR": where, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as the launcher has it
    rows = list[dict[str, Any]]()
    table = Table("", "held-out", "ours", "95%", *(["TRL's", "difference", "95%", "apart"] if not alone else []))
    with tempfile.TemporaryDirectory(prefix="rlhf-peers-") as place:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:  # here TRL would take the group of ours
            for name in names if not alone else []:
                other.submit(train, clone, name, Path(place) / name, steps, threads, where).result()
        os.environ |= place_of(0, 1, free_port())
        start(job_in(clone, "evaluate", where))
        for name in names:
            row = compared(job_in(clone, "evaluate", where), name, None if alone else Path(place) / name)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            cells = [row["measure"], cell(row["ours"]), " … ".join(map(cell, row["ci95_ours"]))]
            if not alone:
                cells += [*map(cell, (row["trl"], row["difference"])), " … ".join(map(cell, row["ci95"])), f"{row['apart']:.1e}"]
            table.add_row(name, *cells)
    Console(width=120).print(table)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- theirs


def rows_of(job: Job, tokenizer: Any, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage as TRL's trainers take them, tokenized, in the order in which the stage takes them."""
    params, pairs = getattr(job.params, stage), "data/prepared/reward.jsonl"
    rows: list[dict[str, Any]]
    if stage == "sft":
        rows = [{"input_ids": ids, "assistant_masks": mask} for ids, mask in sft.read_rows(job, tokenizer)[0]]
    elif stage == "reward":
        found, _ = reward.read_pairs(job, tokenizer, pairs, params.max_tokens)
        rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in found]
    else:
        rows = []
        for (chosen, mask), (rejected, _) in dpo.read_pairs(job, tokenizer, pairs)[0]:
            begin = mask.index(1)
            rows.append({"prompt_ids": chosen[:begin], "chosen_ids": chosen[begin:], "rejected_ids": rejected[begin:]})
    lengths = [sum(map(len, row.values())) for row in rows] if stage != "dpo" and params.group_by_length else None
    order = Order(len(rows), params.batch_size, job.seed("order"), lengths)
    return [rows[i] for step in range(order.steps(params.epochs)) for i in order.batch(step)]


def unused(tokenizer: Any, rows: list[dict[str, Any]]) -> str:
    """A token that no row has, to pad with: transformers reads a reward at the last token that is no padding, and many pad with the end."""
    used = {token for row in rows for ids in row.values() for token in ids}
    return str(tokenizer.convert_ids_to_tokens(next(token for token in range(len(tokenizer)) if token not in used)))


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
        tokenizer.pad_token = unused(tokenizer, rows)
        trl.RewardTrainer(model, trl.RewardConfig(**given), None, data, **common).train()
    else:
        known = load_plain(root / "models/sft", "fp32")

        class Tokenized(trl.DPOTrainer):  # it would tokenize by itself, unlike its siblings
            def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
                return dataset

        Tokenized(model, known, trl.DPOConfig(**given, beta=params.beta), None, data, **common).train()
    model.save_pretrained(to)
    load_tokenizer(root / "models" / BEFORE[stage]).save_pretrained(to)  # the other may have another token of padding


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


def compared(job: Job, stage: str, theirs: Path | None) -> dict[str, Any]:
    """A number of both sides, and how far ours is above theirs (for a loss: below); of ours alone where there is no other."""
    measure, sign, of = MEASURES[stage]
    ours = of(job, job.root / "models" / stage)
    found = {"stage": stage, "measure": measure, "n": len(ours), "ours": float(ours.mean()), "ci95_ours": evaluate.bootstrap(job, ours)}
    if stage == "sft":
        found["before"] = float(of(job, job.root / "models/base").mean())
    if theirs is None:
        return found
    other = of(job, theirs)
    above = sign * (ours - other)
    means = {"trl": float(other.mean()), "difference": float(above.mean()), "ci95": evaluate.bootstrap(job, above)}
    return found | means | {"apart": apart(job.root, stage, theirs)}


def apart(root: Path, stage: str, theirs: Path) -> float:
    """How far TRL's weights are from ours, as a share of how far ours are from those that both began with.

    Of a reward model without its head, which is new.
    """
    folders = (root / "models" / stage, root / "models" / BEFORE[stage], theirs)
    ours, before, other = (load_plain(folder, "fp32", AutoModel).state_dict() for folder in folders)
    between, way = (math.hypot(*(torch.dist(value, one[name]).item() for name, value in ours.items())) for one in (other, before))
    return between / way


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
