"""The updates of a policy on its own answers: mini-batches, the actor's step, mixture text, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from rlhf.algorithms.language_model import next_token_loss
from rlhf.algorithms.ppo import LossStats
from rlhf.engine.distributed import add, gather, share, sum_over_ranks
from rlhf.engine.order import Order
from rlhf.engine.setup import backward, step_together
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.models.packed import pack
from rlhf.models.policy import logits_at
from rlhf.rollout.experience import Experience, Layout
from rlhf.stages.answering import Models, section
from rlhf.tensors import log_probs_and_entropy

MAX_RATIO_ERROR = 1e-3  # of the first mini-batch after a rollout, in fp32: rounding alone stays a hundred times below


@dataclass(frozen=True)
class Batch:
    """What one optimiser step learns from, over all ranks."""

    rows: list[int]  # of the experience
    tokens: float  # of their answers
    texts: list[list[int]]  # passages of the mixture loss

    @property
    def text_tokens(self) -> int:
        """Those that the mixture loss counts."""
        return sum(len(text) - 1 for text in self.texts)


# Compute the gradients of one micro-batch: its rows of the experience, the batch that it is a part of, its own passages, and whether it is
# the batch's last. Gives sums to log, and the ratio that is furthest from 1 where the actor learns.
Learn = Callable[[Sequence[int], Batch, list[list[int]], bool], tuple[dict[str, Tensor], Tensor | None]]


def deal(job: Job, count: int, step: int, together: int = 1) -> list[list[int]]:
    """Rows of each mini-batch, over all ranks: every epoch deals all of them in a fresh order.

    Args:
        together: so many rows, one after the other, stay side by side.
    """
    params = section(job)
    dealt: list[list[int]] = []
    for epoch in range(params.epochs):
        order = list(range(count // together))
        job.random("mini-batches", step, epoch).shuffle(order)
        rows = [unit * together + number for unit in order for number in range(together)]
        dealt += [rows[first : first + params.mini_batch_size] for first in range(0, count, params.mini_batch_size)]
    return dealt


def mini_batches(job: Job, e: Experience, texts: list[list[int]], text_order: Order | None, step: int, together: int = 1) -> list[Batch]:
    """All updates of a step.

    Args:
        texts, text_order: passages of the mixture loss, and which belong to which update.
        together: as in `deal`.
    """
    dealt = deal(job, len(e.sequences), step, together)
    first = step * section(job).updates_per_step
    passages = [[texts[i] for i in text_order.batch(first + number)] if text_order else [] for number in range(len(dealt))]
    tokens = [float(sum(len(e.sequences[i]) - e.prompt_lengths[i] for i in rows)) for rows in dealt]
    return [Batch(*batch) for batch in zip(dealt, tokens, passages, strict=True)]


def update(
    job: Job,
    models: Models,
    batches: Sequence[Batch],
    engines: Mapping[str, DeepSpeedEngine],
    learning: Sequence[str],
    cut: Callable[[list[int]], list[list[int]]],
    learn: Learn,
) -> dict[str, float]:
    """Updates on a rollout batch; stops early once the policy has moved too far from the one that sampled.

    Args:
        engines, learning: all that are trained, by name; the names of those that learn in this step.
        cut: rows of a batch → this rank's, by micro-batch, on each rank equally many.
    """
    params = section(job)
    with_actor = "actor" in learning
    totals: dict[str, float] = {}
    tokens_seen = updates = 0.0
    ratio_error, ratio_max = 0.0, 1.0
    norms = {f"{name}_grad_norm": 0.0 for name in engines}
    for number, batch in enumerate(batches):
        parts = cut(batch.rows)
        texts = share(batch.texts, job, f"{job.stage}.mixture_batch_size") if with_actor else []
        sums: dict[str, Tensor] = {}
        ratios: list[Tensor] = []
        for i, rows in enumerate(parts):
            stats, ratio = learn(rows, batch, texts[i :: len(parts)], i + 1 == len(parts))
            add(sums, stats)
            ratios += [] if ratio is None else [ratio]
        ratio_max = max(ratio_max, *torch.stack(ratios).tolist(), key=lambda value: abs(value - 1)) if ratios else ratio_max
        found = dict(zip(learning, step_together(job, [engines[name] for name in learning]), strict=True))
        norms |= {f"{name}_grad_norm": max(norms[f"{name}_grad_norm"], norm) for name, norm in found.items()}
        if models.ema and math.isfinite(found.get("actor", math.inf)):  # else there was no step: critic warm-up, or overflow
            models.ema.update(models.actor.module)
        if number == 0 and with_actor:
            ratio_error = abs(ratio_max - 1)
        means = sum_over_ranks(sums)
        for name, value in means.items():
            totals[name] = totals.get(name, 0.0) + value
        tokens_seen, updates = tokens_seen + batch.tokens, updates + 1
        if means.get("approx_kl", 0.0) / batch.tokens > params.max_approx_kl:
            break
    ratio_max = max(gather([ratio_max], job), key=lambda value: abs(value - 1))
    ratio_error = max(gather([ratio_error], job))
    losses = {name: totals.pop(name) / updates for name in list(totals) if name.endswith("loss")}
    means = {name: value / tokens_seen for name, value in totals.items()}
    return {**losses, **means, **norms, "ratio_max": ratio_max, "ratio_error": ratio_error, "updates": updates}


def actor_step(
    job: Job,
    models: Models,
    at: Layout,
    old_log_probs: Tensor,
    policy_loss: Callable[[Tensor], LossStats],
    batch: Batch,
    texts: list[list[int]],
    *,
    last: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the policy loss, and of the mixture loss, on one micro-batch.

    Args:
        old_log_probs: (B, A) under the policy that sampled, 0 beyond an answer's end.
        policy_loss: of the log-probabilities (B, A).
        texts: passages of this micro-batch.
        last: micro-batch of the mini-batch.

    Returns:
        sums to log; the ratio that is furthest from 1
    """
    params, actor = section(job), models.actor
    logits = logits_at(actor, at.packed, at.before)
    found, entropies = log_probs_and_entropy(logits, at.targets, params.temperature)
    log_probs = at.fill(found)
    policy = policy_loss(log_probs)
    loss, sums = policy.loss, {"policy_loss": policy.loss, "entropy": entropies.sum()}
    if params.entropy_coefficient:
        loss = loss - params.entropy_coefficient * entropies.sum() / batch.tokens
    if texts:
        packed = pack(texts, actor.device)
        wanted = packed.predictions([[1] * len(text) for text in texts])
        mixture = next_token_loss(logits_at(actor, packed, wanted.places), wanted.targets, batch.text_tokens)
        loss = loss + params.mixture_coefficient * mixture
        sums["mixture_loss"] = mixture
    backward(actor, loss, last=last)
    ratio = (log_probs.detach() - old_log_probs).exp()
    return {**sums, **policy.sums}, ratio.flatten()[(ratio - 1).abs().argmax()]


def check_ratio(job: Job, step: int, error: float) -> None:
    """Check that the first mini-batch after a rollout found the policy that sampled it: |ratio − 1| is rounding in fp32.

    Raises:
        UserError: it is more.
    """
    if job.params.launch.precision == "fp32" and error > MAX_RATIO_ERROR:
        raise UserError(
            f"stage {job.stage}, step {step}: training does not find the log-probabilities that the answers were sampled with: "
            f"|ratio − 1| is {error:.2g} before the first update, above {MAX_RATIO_ERROR:g}",
            remedy="this is a fault in how base.model is run, not in your data: choose another model, and report this one",
        )
