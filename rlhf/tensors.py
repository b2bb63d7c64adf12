"""Small tensor functions that every algorithm shares: torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows whose logits are turned to fp32 at a time: bounds the peak of the log-softmax.
CHUNK_TOKENS = 4096


def mask_from_lengths(lengths: Tensor, width: int, start: Tensor | int = 0) -> Tensor:
    """1 where ``start ≤ position < lengths``. Lengths (B,) → mask (B, width), float.

    Masks come from lengths, never from ``ids != pad``: where the pad token is the end-of-text token, the real end must count.
    """
    positions = torch.arange(width, device=lengths.device)[None, :]
    begin = start[:, None] if isinstance(start, Tensor) else start
    return ((positions >= begin) & (positions < lengths[:, None])).float()


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target token in fp32. Logits (N, V), targets (N,) → (N,).

    The log-softmax and its gradient run over chunks of rows, so that a full fp32 copy of the logits never exists.
    """
    return _TokenLogProbs.apply(logits, targets, temperature)


class _TokenLogProbs(torch.autograd.Function):
    """Keeps one number per row for the backward pass; left to itself, autograd would keep fp32 logits of every chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        parts, totals = [], []
        for rows, wanted in zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            scaled = rows.float() / temperature
            totals.append(scaled.logsumexp(-1))
            parts.append(scaled.gather(-1, wanted[:, None]).squeeze(-1) - totals[-1])
        ctx.save_for_backward(logits, targets, torch.cat(totals))
        ctx.temperature = temperature
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # the base class is untyped in its arguments
        """d log p(target) / d logits = (1[target] − softmax) / temperature."""
        logits, targets, totals = ctx.saved_tensors
        result = torch.empty_like(logits)
        chunks = (tensor.split(CHUNK_TOKENS) for tensor in (logits, targets, totals, grad, result))
        for rows, wanted, total, slope, into in zip(*chunks, strict=True):
            change = (rows.float() / ctx.temperature).sub_(total[:, None]).exp_().mul_(-slope[:, None])
            change.scatter_add_(1, wanted[:, None], slope[:, None])
            into.copy_(change.div_(ctx.temperature))
        return result, None, None


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of each row's distribution. Logits (N, V) → (N,)."""
    parts = []
    for rows in logits.split(CHUNK_TOKENS):
        log_probs = (rows.float() / temperature).log_softmax(-1)
        parts.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(parts)
