"""Stage reward: a reward model on the preference pairs, from base's backbone with a new head; normalised on held-out answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.pairwise import pairwise_loss
from rlhf.config.training import Reward, peak
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import add, layout, micro_batches, own_micro_batches, start, sum_over_ranks
from rlhf.engine.order import Order
from rlhf.engine.partition import born, written
from rlhf.engine.setup import backward, settings, step, train_engine
from rlhf.engine.steps import Steps
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run
from rlhf.models import lora
from rlhf.models.dialogues import encode_dialogues
from rlhf.models.packed import pack
from rlhf.models.policy import check_length
from rlhf.models.scalar import ScalarModel, initialise_head, load_scalar, save_scalar, values_at
from rlhf.models.tokenizer import load_tokenizer

Pair = tuple[list[int], list[int]]  # token ids of prompt + chosen, of prompt + rejected
# for the held-out curve: enough to see where it turns, too few to be felt in the time of the stage
CURVE_POINTS = 8
CURVE_PAIRS = 200


def main(job: Job) -> None:
    start(job)
    params = job.params.reward
    tokenizer = load_tokenizer(job.input("models/base"))
    pairs, too_long = read_pairs(job, tokenizer, "data/prepared/reward.jsonl", params.max_tokens)
    held_out, _ = read_pairs(job, tokenizer, "data/prepared/heldout_pairs.jsonl", params.max_tokens)
    scalar = new_scalar(job, tokenizer, "head")
    check_length(scalar.model, params.max_tokens, "reward.max_tokens")
    adapters = lora.attach(scalar.model, params.lora, "models/base", "reward.lora", job)
    history = fit(job, scalar, pairs, params, held_out[:CURVE_PAIRS])
    chosen, rejected = score_pairs(scalar, held_out, layout(job).micro_batch_tokens)
    normalise(scalar, chosen + rejected)
    save_scalar(job, scalar, tokenizer, job.output("models/reward"), adapters)
    if job.is_main:
        job.write_metrics(
            {
                "loss": history[-1]["loss"],
                "accuracy": history[-1]["accuracy"],
                "heldout_accuracy": accuracy(chosen, rejected),
                "heldout_pairs": len(held_out),
                "reward_mean": scalar.mean,
                "reward_std": scalar.std,
                "steps": len(history),
                "pairs": len(pairs),
                "too_long": too_long,
                **lora.share(adapters),
            }
        )
        job.write_plot("plots/reward.csv", history)


def new_scalar(job: Job, tokenizer: Any, purpose: str) -> ScalarModel:
    """Base's backbone with a new head, whose weights `purpose` seeds."""
    with born(settings(job, "critic")):
        scalar = load_scalar(job.input("models/base"), tokenizer, job.params.launch.precision)
    with written(scalar.head.weight):
        initialise_head(scalar, job.seed(purpose))
    return scalar


def read_pairs(job: Job, tokenizer: Any, path: str, max_tokens: int) -> tuple[list[Pair], int]:
    """The pairs of a prepared file as token ids, and how many were left out as too long.

    Raises:
        UserError: no pair is left.
    """
    rows = read_lines(job.input(path))
    dialogues = ([*row["prompt"], {"role": "assistant", "content": row[side]}] for row in rows for side in ("chosen", "rejected"))
    sides = [ids for ids, _ in encode_dialogues(tokenizer, dialogues)]
    pairs = [pair for pair in zip(sides[::2], sides[1::2], strict=True) if max(map(len, pair)) <= max_tokens]
    if not pairs:
        raise UserError(
            f"{path}: none of {len(rows)} pairs fits in {max_tokens} tokens", remedy=f"raise {job.stage}'s max_tokens in params.yaml"
        )
    return pairs, len(rows) - len(pairs)


def fit(job: Job, scalar: ScalarModel, pairs: Sequence[Pair], params: Reward, held_out: Sequence[Pair] = ()) -> list[dict[str, float]]:
    """Train a reward model in place; returns a row per step for the plot.

    Args:
        held_out: pairs whose accuracy is measured at CURVE_POINTS steps, for the plot alone: it changes nothing in the training.
    """
    lengths = [len(chosen) + len(rejected) for chosen, rejected in pairs] if params.group_by_length else None
    order = Order(len(pairs), params.batch_size, job.seed("order"), lengths)
    total = order.steps(params.epochs)
    engine = train_engine(scalar, peak(params.optimizer, params.lora), job, "critic", total)
    state = checkpoints.load(job, {"model": engine})
    history: list[dict[str, float]] = state.get("history", [])
    steps = Steps(job, state["step"], total, params.checkpoint_every)
    measured = {total * point // CURVE_POINTS for point in range(1, CURVE_POINTS + 1)} if held_out else set()
    for number in steps:
        started = time.perf_counter()
        batch = [pairs[i] for i in order.batch(number)]
        sums: dict[str, Tensor] = {}
        parts = own_micro_batches(batch, tokens_of_pair, job, f"{job.stage}.batch_size")
        for number_of_part, micro in enumerate(parts, start=1):
            packed = pack([ids for pair in micro for ids in pair], engine.device)
            scores = values_at(engine, packed, packed.last)
            loss, stats = pairwise_loss(scores[::2], scores[1::2], len(batch))
            backward(engine, loss, last=number_of_part == len(parts))
            add(sums, {"loss": loss, **{name: value.double() / len(batch) for name, value in stats.items()}})
        means = {**sum_over_ranks(sums), "grad_norm": step(engine)}
        divergence.check(job, number + 1, means, {})
        speed = {"learning_rate": engine.get_lr()[0], "pairs_per_second": len(batch) / (time.perf_counter() - started)}
        if number + 1 in measured:
            means["heldout_accuracy"] = accuracy(*score_pairs(scalar, held_out, layout(job).micro_batch_tokens))
            scalar.train()
        history.append({"step": number + 1, **means})
        job.log(number + 1, total, {**means, **speed})
        if steps.checkpoint_due(number):
            checkpoints.save(job, number + 1, {"model": engine}, {"history": history}, -means["loss"])
    return history


def tokens_of_pair(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


@torch.no_grad()
def score(scalar: ScalarModel, rows: Sequence[list[int]], tokens: int, *, together: int = 1) -> list[float]:
    """The raw score of each row of token ids, in the order given.

    Args:
        tokens: most of a forward pass.
        together: so many rows, one after the other, begin alike, which one forward pass makes use of.
    """
    scalar.eval()
    device = next(scalar.parameters()).device
    scores = [0.0] * len(rows)
    blocks = [range(first, first + together) for first in range(0, len(rows), together)]
    for part in micro_batches(blocks, lambda block: sum(len(rows[i]) for i in block), tokens):
        index = [i for block in part for i in block]
        packed = pack([rows[i] for i in index], device)
        for i, value in zip(index, values_at(scalar, packed, packed.last).tolist(), strict=True):
            scores[i] = value
    return scores


def score_pairs(scalar: ScalarModel, pairs: Sequence[Pair], tokens: int) -> tuple[list[float], list[float]]:
    scores = score(scalar, [ids for pair in pairs for ids in pair], tokens, together=2)
    return scores[::2], scores[1::2]


def accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen answer scores higher."""
    return statistics.fmean(c > r for c, r in zip(chosen, rejected, strict=True))


def normalise(scalar: ScalarModel, scores: Sequence[float]) -> None:
    """Keep mean and std of held-out scores with the model, so that PPO's rewards have mean 0 and std 1 there."""
    scalar.model.config.reward_mean = statistics.fmean(scores)
    scalar.model.config.reward_std = statistics.pstdev(scores) or 1.0


if __name__ == "__main__":
    run("reward", main)
