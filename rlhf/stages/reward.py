"""Stage reward: a reward model on the preference pairs, from base's backbone with a new head; normalised on held-out answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.algorithms.pairwise import pairwise_loss
from rlhf.config.training import Reward
from rlhf.data.batches import Order, encode_dialogue, pack
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import layout, micro_batches, share, start, sum_over_ranks
from rlhf.engine.setup import backward, step, train_engine
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run
from rlhf.models.policy import save_model
from rlhf.models.scalar import ScalarModel, initialise_head, load_scalar
from rlhf.models.tokenizer import load_tokenizer

Pair = tuple[list[int], list[int]]  # token ids of prompt + chosen, of prompt + rejected


def main(job: Job) -> None:
    start(job)
    params = job.params.reward
    tokenizer = load_tokenizer(job.input("models/base"))
    pairs, too_long = read_pairs(job, tokenizer, "data/prepared/reward.jsonl", params.max_tokens)
    held_out, _ = read_pairs(job, tokenizer, "data/prepared/heldout_pairs.jsonl", params.max_tokens)
    scalar = load_scalar(job.input("models/base"), tokenizer, job.params.launch.precision)
    initialise_head(scalar, job.seed("head"))
    history = fit(job, scalar, pairs, params, tokenizer.pad_token_id)
    if job.is_main:
        chosen, rejected = score_pairs(scalar, held_out, tokenizer.pad_token_id, params.batch_size)
        normalise(scalar, chosen + rejected)
        save_model(scalar.model, tokenizer, job.output("models/reward"))
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
            }
        )
        job.write_plot("plots/reward.csv", history)


def read_pairs(job: Job, tokenizer: Any, path: str, max_tokens: int) -> tuple[list[Pair], int]:
    """The pairs of a prepared file as token ids, and how many were left out as too long.

    Raises:
        UserError: no pair is left.
    """
    rows = read_lines(job.input(path))
    pairs = []
    for row in rows:
        sides = [
            encode_dialogue(tokenizer, [*row["prompt"], {"role": "assistant", "content": row[side]}])[0] for side in ("chosen", "rejected")
        ]
        if max(map(len, sides)) <= max_tokens:
            pairs.append((sides[0], sides[1]))
    if not pairs:
        raise UserError(
            f"{path}: none of {len(rows)} pairs fits in {max_tokens} tokens", remedy=f"raise {job.stage}'s max_tokens in params.yaml"
        )
    return pairs, len(rows) - len(pairs)


def fit(job: Job, scalar: ScalarModel, pairs: Sequence[Pair], params: Reward, pad_id: int) -> list[dict[str, float]]:
    """Train a reward model in place; returns a row per step for the plot."""
    order = Order(len(pairs), params.batch_size, job.seed("order"))
    total = order.steps(params.epochs)
    engine = train_engine(scalar, params.optimizer, job, params.batch_size, total)
    state = checkpoints.load(job, {"model": engine})
    history: list[dict[str, float]] = state.get("history", [])
    for number in range(state["step"], total):
        started = time.perf_counter()
        batch = [pairs[i] for i in order.batch(number)]
        mine = share(batch, job, f"{job.stage}.batch_size")
        sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "chosen_score": 0.0, "rejected_score": 0.0}
        for micro in micro_batches(mine, layout(job).micro_batch_size):
            packed = pack([ids for pair in zip(*micro, strict=True) for ids in pair], pad_id, engine.device)
            scores = engine(**packed.inputs)[packed.last]  # first the chosen, then the rejected
            loss, stats = pairwise_loss(scores[: len(micro)], scores[len(micro) :], len(batch))
            backward(engine, loss)
            sums["loss"] += loss.item()
            for name, value in stats.items():
                sums[name] += value.item() / len(batch)
        means = {**sum_over_ranks(sums, engine.device), "grad_norm": step(engine)}
        divergence.check(job, number + 1, means, {})
        history.append({"step": number + 1, **means})
        speed = {"learning_rate": engine.get_lr()[0], "pairs_per_second": len(batch) / (time.perf_counter() - started)}
        job.log(number + 1, total, {**means, **speed})
        if (number + 1) % params.checkpoint_every == 0 and number + 1 < total:
            checkpoints.save(job, number + 1, {"model": engine}, {"history": history})
    return history


@torch.no_grad()
def score(scalar: ScalarModel, rows: Sequence[list[int]], pad_id: int, batch_size: int) -> list[float]:
    """The raw score of each row of token ids, in the order given."""
    scalar.eval()
    device = next(scalar.parameters()).device
    scores: list[float] = []
    for part in micro_batches(rows, batch_size):
        packed = pack(part, pad_id, device)
        scores += scalar(**packed.inputs)[packed.last].tolist()
    return scores


def score_pairs(scalar: ScalarModel, pairs: Sequence[Pair], pad_id: int, batch_size: int) -> tuple[list[float], list[float]]:
    scores = score(scalar, [pair[0] for pair in pairs] + [pair[1] for pair in pairs], pad_id, batch_size)
    return scores[: len(pairs)], scores[len(pairs) :]


def accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen answer scores higher."""
    return statistics.fmean(c > r for c, r in zip(chosen, rejected, strict=True))


def normalise(scalar: ScalarModel, scores: Sequence[float]) -> None:
    """Keep mean and std of held-out scores with the model, so that PPO's rewards have mean 0 and std 1 there."""
    scalar.model.config.reward_mean = statistics.fmean(scores)
    scalar.model.config.reward_std = statistics.pstdev(scores) or 1.0


if __name__ == "__main__":
    run("reward", main)
