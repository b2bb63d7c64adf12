"""Speed of stages sft, reward and dpo against TRL's trainers: same weights, rows, batches, optimiser and precision, in turn.

python bench/speed/training.py                         all cases: some minutes on one core
python bench/speed/training.py --quick                 fewer rounds
python bench/speed/training.py --pairs pairs.jsonl.gz  rows of a file of Anthropic-style pairs instead of the sandbox's

Each side is a process of its own (sides.py). Ours is the stage's `main`, TRL's is `train` of the trainer, both with whatever they
check, measure and log in a step. In bf16 ours holds such weights beside fp32 ones; TRL's trainers, set
to it, compute in it on fp32 weights. A round is one optimiser step on the same rows. Counted are tokens that are not padding (sft) and
pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForSequenceClassification, TrainerCallback

from bench.speed.report import Case, case, collect, console, table, write
from bench.speed.sides import Pause, Side, stage
from bench.speed.workload import NEVER, OPTIMIZER, SMALL, Workspace, jobs, load_plain, make_model, workspace
from rlhf.engine.order import Order
from rlhf.engine.speed import Products, matrix_rate
from rlhf.models.dialogues import encode_dialogues
from rlhf.models.policy import DTYPES
from rlhf.models.tokenizer import load_tokenizer

BATCH, ANSWER_TOKENS = 16, 128
FEWER = {("dpo", "llama-135m"): 8}  # TRL's takes 16 GiB for 16 pairs, and both sides are there at once
WORK = (*((family, precision) for precision in ("fp32", "bf16") for family in SMALL), ("llama-135m", "bf16"), ("llama-135m", "fp32"))
# what TRL's trainers are given beside their own options
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "optim": "adamw_torch_fused",
    "learning_rate": OPTIMIZER["learning_rate"],
    "lr_scheduler_type": "constant",
    "adam_beta1": OPTIMIZER["betas"][0],
    "adam_beta2": OPTIMIZER["betas"][1],
    "adam_epsilon": OPTIMIZER["epsilon"],
    "max_grad_norm": OPTIMIZER["max_grad_norm"],
}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two rounds.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with `chosen` and `rejected` dialogues; may end in .gz.")] = None,
    only: Annotated[str, typer.Option(help="A part of the names of the cases wanted.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds; the median of their ratios counts.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of either side.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Print tokens or pairs per second of both sides, and the median of the rounds' ratios."""
    found = collect(cases(pairs, 2 if quick else rounds, threads, only))
    console().print(table(found))
    if output:
        write(output, found)


def cases(pairs: Path | None, rounds: int, threads: int, only: str = "") -> Iterator[Case]:
    """Each stage, model and precision."""
    for family, precision in WORK:
        for stage_name in PEERS:
            name, batch = f"{stage_name}, {family}, {precision}", FEWER.get((stage_name, family), BATCH)
            if only in name:
                with workspace(family, pairs, rounds * batch, ANSWER_TOKENS, params(batch), precision=precision) as place:
                    yield measured(name, stage_name, family, place, batch, precision, rounds, threads)


def params(batch: int) -> dict[str, dict[str, Any]]:
    each = {"epochs": 1.0, "batch_size": batch, "max_tokens": 512, "optimizer": OPTIMIZER, "checkpoint_every": NEVER}
    return {**dict.fromkeys(PEERS, each), "launch": {"jobs": jobs()}}


def measured(name: str, stage_name: str, family: str, place: Workspace, batch: int, precision: str, rounds: int, threads: int) -> Case:
    order = Order(len(place.pairs), batch, place.job(stage_name).seed("order"))
    rows = [place.pairs[i] for step in range(rounds) for i in order.batch(step)]
    data = [
        {"prompt": pair.dialogue("")[:1], "chosen": pair.dialogue(pair.chosen)[1:], "rejected": pair.dialogue(pair.rejected)[1:]}
        for pair in rows
    ]
    with (
        Side(stage, place.root, stage_name, threads=threads, ranks=1) as ours,
        Side(PEERS[stage_name], place.root, data, batch, precision, threads=threads) as theirs,
    ):
        costs = [(ours.step(), theirs.step()) for _ in range(rounds + 1)][1:]  # the first is to get ready
    sides = [encode_dialogues(place.tokenizer, (pair.dialogue(getattr(pair, side)) for pair in rows)) for side in ("chosen", "rejected")]
    lengths = [len(ids) for ids, _ in sides[0]]
    ours_gib, peer_gib = (max(pair[side].memory for pair in costs) / 2**30 for side in (0, 1))
    work = [sum(lengths[i : i + batch]) if stage_name == "sft" else batch for i in range(0, len(rows), batch)]
    share, peer_share = (
        operations(stage_name, family, sides) / sum(pair[side].seconds for pair in costs) / rate(precision, threads) for side in (0, 1)
    )
    return case(
        name,
        work,
        costs,
        "tokens/s" if stage_name == "sft" else "pairs/s",
        f"{place.parameters / 1e6:.1f} million weights, {precision}, {threads} threads, {batch} rows a step, prompt with answer "
        f"{statistics.fmean(lengths):.0f} tokens on average, {max(lengths)} at most; memory {ours_gib:.2f} GiB against {peer_gib:.2f}; "
        f"{share:.0%} against {peer_share:.0%} of the rate of large products; TRL: {SETTING[stage_name]}",
    )


def operations(stage_name: str, family: str, sides: Sequence[Sequence[tuple[list[int], list[int]]]]) -> float:
    """Floating-point operations that all rows take, a prompt being read once for both answers (rlhf/engine/speed.py says what counts)."""
    products = Products.of(make_model(family, "meta"))
    prompts = sum(len(ids) - sum(mask) for ids, mask in sides[0])
    answers = [sum(sum(mask) for _, mask in side) for side in sides]
    if stage_name == "sft":
        return products.training(prompts + answers[0], answers[0])
    if stage_name == "reward":
        return products.training(prompts + sum(answers))
    return products.training(prompts + sum(answers), sum(answers)) + products.forward(prompts + sum(answers), sum(answers))


def rate(precision: str, threads: int) -> float:
    """Floating-point operations per second in products of large matrices."""
    torch.set_num_threads(threads)
    return matrix_rate(torch.device("cpu"), DTYPES[precision])


# ----------------------------------------------------------------------------------------------------------------- peers


class Pausing(TrainerCallback):
    """Pauses a trainer when it begins, and after every so many optimiser steps."""

    def __init__(self, pause: Pause, every: int = 1) -> None:
        self.pause, self.every = pause, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pause()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.pause()


def of_batches(root: Path, rows: list[dict[str, Any]], batch: int, precision: str) -> tuple[dict[str, Any], Any]:
    """A trainer's settings and data, of rows in the order in which they are to be taken."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    batches = {
        "bf16": precision == "bf16",
        "output_dir": str(root / "trl"),
        "per_device_train_batch_size": batch,
        "train_sampling_strategy": "sequential",
    }
    return SETTINGS | batches | {"max_length": None}, Dataset.from_list(rows)


def sft_peer(pause: Pause, root: Path, rows: list[dict[str, Any]], batch: int, precision: str) -> None:
    from trl import SFTConfig, SFTTrainer

    settings, data = of_batches(root, [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows], batch, precision)
    given = SFTConfig(**settings, loss_type="chunked_nll")
    tokenizer = load_tokenizer(root / "models/base")
    SFTTrainer(load_plain(root / "models/base", "fp32"), given, None, data, processing_class=tokenizer, callbacks=[Pausing(pause)]).train()


def reward_peer(pause: Pause, root: Path, rows: list[dict[str, Any]], batch: int, precision: str) -> None:
    from trl import RewardConfig, RewardTrainer

    settings, data = of_batches(root, rows, batch, precision)
    tokenizer = load_tokenizer(root / "models/base")
    model = load_plain(root / "models/reward", "fp32", AutoModelForSequenceClassification)
    RewardTrainer(model, RewardConfig(**settings), None, data, processing_class=tokenizer, callbacks=[Pausing(pause)]).train()


def dpo_peer(pause: Pause, root: Path, rows: list[dict[str, Any]], batch: int, precision: str) -> None:
    from trl import DPOConfig, DPOTrainer

    settings, data = of_batches(root, rows, batch, precision)
    tokenizer = load_tokenizer(root / "models/sft")
    policy, known = (load_plain(root / "models/sft", "fp32") for _ in range(2))
    DPOTrainer(policy, known, DPOConfig(**settings), None, data, processing_class=tokenizer, callbacks=[Pausing(pause)]).train()


PEERS = {"sft": sft_peer, "reward": reward_peer, "dpo": dpo_peer}
SETTING = {"sft": "padded, loss chunked_nll", "reward": "padded", "dpo": "padded, as it has no other way"}


if __name__ == "__main__":
    typer.run(main)
