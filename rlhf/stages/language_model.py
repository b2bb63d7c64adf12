"""The loop that base and sft share: next-token loss on rows of tokens, and perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf.algorithms.language_model import next_token_loss
from rlhf.config.training import BuiltBase, Sft, peak
from rlhf.data.batches import Order, pack
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import layout, micro_batches, share, sum_over_ranks
from rlhf.engine.setup import backward, step, train_engine
from rlhf.engine.steps import Steps
from rlhf.job import Job

Row = tuple[list[int], list[int]]  # token ids and loss mask


def fit(job: Job, model: PreTrainedModel, rows: Sequence[Row], params: BuiltBase | Sft, pad_id: int) -> list[dict[str, float]]:
    """Train `model` in place; returns a row per step for the plot."""
    by_length = isinstance(params, Sft) and params.group_by_length
    order = Order(len(rows), params.batch_size, job.seed("order"), [len(ids) for ids, _ in rows] if by_length else None)
    total = order.steps(params.epochs)
    optimizer = params.optimizer if isinstance(params, BuiltBase) else peak(params.optimizer, params.lora)
    engine = train_engine(model, optimizer, job, "policy", params.batch_size, total)
    state = checkpoints.load(job, {"model": engine})
    history: list[dict[str, float]] = state.get("history", [])
    steps = Steps(job, state["step"], total, params.checkpoint_every)
    for number in steps:
        started = time.perf_counter()
        batch = [rows[i] for i in order.batch(number)]
        counted = sum(sum(mask[1:]) for _, mask in batch)  # of the global batch: every rank sees it whole
        mine = share(batch, job, f"{job.stage}.batch_size")
        loss_sum = 0.0
        for micro in micro_batches(mine, layout(job).micro_batch_size):
            packed = pack([ids for ids, _ in micro], pad_id, engine.device)
            loss_mask = packed.spread([[0, *mask[1:]] for _, mask in micro])
            loss = next_token_loss(engine(**packed.inputs).logits, packed.ids, loss_mask, counted)
            backward(engine, loss)
            loss_sum += loss.item()
        loss_mean = sum_over_ranks({"loss": loss_sum}, engine.device)["loss"]
        stats = {"loss": loss_mean, "grad_norm": step(engine)}
        divergence.check(job, number + 1, stats, {})
        history.append({"step": number + 1, **stats})
        seconds = time.perf_counter() - started
        rate = {"learning_rate": engine.get_lr()[0]}
        job.log(number + 1, total, {**stats, **rate, "tokens_per_second": sum(len(ids) for ids, _ in batch) / seconds})
        if steps.checkpoint_due(number):
            checkpoints.save(job, number + 1, {"model": engine}, {"history": history}, -loss_mean)
    return history


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Sequence[list[int]], pad_id: int, batch_size: int) -> float:
    """exp of the mean next-token loss over all tokens of the rows but each row's first."""
    model.eval()
    device = next(model.parameters()).device
    counted = sum(len(row) - 1 for row in rows)
    loss = 0.0
    for part in micro_batches(rows, batch_size):
        packed = pack(part, pad_id, device)
        loss_mask = packed.spread([[0] + [1] * (len(row) - 1) for row in part])
        loss += next_token_loss(model(**packed.inputs).logits, packed.ids, loss_mask, counted).item()
    return math.exp(loss)
