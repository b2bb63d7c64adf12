"""Small tensor functions that every algorithm shares: torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.kernels import kernels

# Logits that are turned to fp32 at a time. On a CPU they stay in its cache from one operation to the next; on a GPU a few large kernels
# are better than many small ones, and the number bounds the memory.
CHUNK = {"cpu": 2**18, "cuda": 2**26}
LOWEST = torch.finfo(torch.float32).min  # in the place of -∞, which is no number once it is multiplied by a probability of 0


def shape(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape: one that ranks share out (rlhf/engine/partition.py) shows itself as empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Numbers made on the CPU, to the device of a model. A GPU is not waited for: it finds them when it comes to what needs them."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def mask_from_lengths(lengths: Tensor, width: int, start: Tensor | int = 0) -> Tensor:
    """1 where ``start ≤ position < lengths``. Lengths (B,) → mask (B, width), float.

    Masks come from lengths, never from ``ids != pad``: where the pad token is the end-of-text token, the real end must count.
    """
    positions = torch.arange(width, device=lengths.device)[None, :]
    begin = start[:, None] if isinstance(start, Tensor) else start
    return ((positions >= begin) & (positions < lengths[:, None])).float()


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target token in fp32. Logits (n, V), targets (n,) → (n,)."""
    return log_probs_and_entropy(logits, targets, temperature)[0]


def log_probs_and_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy in nats of its distribution, in fp32. Logits (n, V), targets (n,) → (n,), (n,).

    Both, and their gradients, are computed over chunks of rows, so that a full fp32 copy of the logits never exists.
    """
    return _LogProbsAndEntropy.apply(logits, targets, temperature)


class _LogProbsAndEntropy(torch.autograd.Function):
    """Keeps two numbers per row for the backward pass; left to itself, autograd would keep fp32 logits of every chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.kernels = kernels("logits") if logits.device.type == "cuda" and logits.stride(-1) == 1 else None
        if ctx.kernels:
            log_probs, totals, entropies = ctx.kernels.measure(logits, targets, temperature)
            ctx.save_for_backward(logits, targets, totals, entropies)
            return log_probs, entropies
        log_probs, totals, entropies = torch.empty(3, len(logits), device=logits.device)
        for at in _chunks(logits):
            scaled = logits[at].float() / temperature
            largest = scaled.amax(-1, keepdim=True)
            weights = (scaled - largest).exp_()
            sums = weights.sum(-1)
            totals[at] = largest.squeeze(-1) + sums.log()
            log_probs[at] = scaled.gather(-1, targets[at, None]).squeeze(-1) - totals[at]
            scaled.clamp_(min=LOWEST)
            entropies[at] = totals[at] - torch.linalg.vecdot(weights, scaled) / sums  # −Σ p·log p, with log p = scaled − total
        ctx.save_for_backward(logits, targets, totals, entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *of_outputs: Any) -> tuple[Tensor, None, None]:
        """d log p(target) / d logits = (1[target] − p) / temperature; d entropy / d logits = −p·(log p + entropy) / temperature."""
        slopes, entropy_slopes = of_outputs
        logits, targets, totals, entropies = ctx.saved_tensors
        if slopes is None:  # of log-probabilities that no loss is made of
            slopes = torch.zeros_like(totals)
        if ctx.kernels:
            return ctx.kernels.slopes(*ctx.saved_tensors, slopes, entropy_slopes, ctx.temperature), None, None
        result = torch.empty_like(logits)
        for at in _chunks(logits):
            change = (logits[at].float() / ctx.temperature).sub_(totals[at, None])  # log p
            if entropy_slopes is None:
                change.exp_().mul_(-slopes[at, None])
            else:
                chances = change.exp()
                change.clamp_(min=LOWEST).add_(entropies[at, None]).mul_(-entropy_slopes[at, None]).sub_(slopes[at, None]).mul_(chances)
            change.scatter_add_(1, targets[at, None], slopes[at, None])
            result[at] = change.div_(ctx.temperature)
        return result, None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Rows of each chunk."""
    size = max(1, CHUNK[logits.device.type] // logits.shape[1])
    return [slice(first, first + size) for first in range(0, len(logits), size)]
