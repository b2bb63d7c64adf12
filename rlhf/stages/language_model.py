"""The loop that base, sft and best_of_n share: next-token loss on rows of tokens, and perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.algorithms.language_model import next_token_loss
from rlhf.config.stored import BestOfN
from rlhf.config.training import BuiltBase, Sft, peak
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import add, micro_batches, own_micro_batches, sum_over_ranks
from rlhf.engine.order import Order
from rlhf.engine.setup import backward, step, train_engine
from rlhf.engine.steps import Steps
from rlhf.job import Job
from rlhf.models.packed import pack
from rlhf.models.policy import logits_at

Row = tuple[list[int], list[int]]  # token ids and loss mask
MOST = 700.0  # whose exponential is a number


def fit(job: Job, model: PreTrainedModel, rows: Sequence[Row], params: BuiltBase | Sft | BestOfN) -> list[dict[str, float]]:
    """Train `model` in place; returns a row per step for the plot."""
    by_length = isinstance(params, Sft) and params.group_by_length
    order = Order(len(rows), params.batch_size, job.seed("order"), [len(ids) for ids, _ in rows] if by_length else None)
    total = order.steps(params.epochs)
    optimizer = params.optimizer if isinstance(params, BuiltBase) else peak(params.optimizer, params.lora)
    engine = train_engine(model, optimizer, job, "policy", total)
    state = checkpoints.load(job, {"model": engine})
    history: list[dict[str, float]] = state.get("history", [])
    steps = Steps(job, state["step"], total, params.checkpoint_every)
    for number in steps:
        started = time.perf_counter()
        batch = [rows[i] for i in order.batch(number)]
        counted = sum(sum(mask[1:]) for _, mask in batch)  # of the global batch: every rank sees it whole
        sums: dict[str, Tensor] = {}
        parts = own_micro_batches(batch, lambda row: len(row[0]), job, f"{job.stage}.batch_size")
        for number_of_part, micro in enumerate(parts, start=1):
            packed = pack([ids for ids, _ in micro], engine.device)
            wanted = packed.predictions([mask for _, mask in micro])
            loss = next_token_loss(logits_at(engine, packed, wanted.places), wanted.targets, counted)
            backward(engine, loss, last=number_of_part == len(parts))
            add(sums, {"loss": loss})
        stats = {**sum_over_ranks(sums), "grad_norm": step(engine)}
        divergence.check(job, number + 1, stats, {})
        history.append({"step": number + 1, **stats})
        seconds = time.perf_counter() - started
        rate = {"learning_rate": engine.get_lr()[0]}
        job.log(number + 1, total, {**stats, **rate, "tokens_per_second": sum(len(ids) for ids, _ in batch) / seconds})
        if steps.checkpoint_due(number):
            checkpoints.save(job, number + 1, {"model": engine}, {"history": history}, -stats["loss"])
    return history


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Sequence[list[int]], tokens: int) -> float:
    """exp of the mean next-token loss over all tokens of the rows but each row's first; so many tokens to a forward pass.

    Infinite where it is larger than any number.
    """
    model.eval()
    device = next(model.parameters()).device
    counted = sum(len(row) - 1 for row in rows)
    loss = 0.0
    for part in micro_batches(rows, len, tokens):
        packed = pack(part, device)
        wanted = packed.predictions([[1] * len(row) for row in part])
        loss += next_token_loss(logits_at(model, packed, wanted.places), wanted.targets, counted).item()
    return math.inf if loss > MOST else math.exp(loss)
