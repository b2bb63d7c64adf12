"""How a token is drawn: one uniform number per token, and the inverse of the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.kernels import kernels

PART = 128  # columns


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest token."""

    temperature: float
    top_k: int  # among the k likeliest; 0: all
    top_p: float  # in the nucleus of this mass; 1: all
    max_new_tokens: int
    of_what_is_left: bool = False  # log-probabilities are those among the tokens that top_k and top_p leave; else among all


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(B, count) numbers in [0, 1), each row from its own seed."""
    numbers = torch.empty(len(seeds), count)
    for row, seed in zip(numbers, seeds, strict=True):
        torch.rand(count, generator=torch.Generator().manual_seed(seed), out=row)
    return numbers


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverse-CDF sampling, and its log-probability. Logits (B, V), uniforms (B,) → (B,), (B,).

    The log-probability is that of the full distribution at the sampling temperature, as training computes it, although top-k and top-p
    narrow what is drawn; or that of the distribution drawn from, where `sampling` asks for it.
    """
    plain = sampling.temperature > 0 and not sampling.top_k and sampling.top_p == 1
    if plain and logits.device.type == "cuda" and (found := kernels("drawing")):
        return cast(tuple[Tensor, Tensor], found.draw(logits, uniforms, sampling.temperature))
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    chances = logits.softmax(-1)  # at once: on a CPU a row stays in its cache
    among: Tensor | None = None
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif sampling.top_k or sampling.top_p < 1:
        tokens, among = _narrowed(chances, uniforms, sampling)
    else:
        tokens = drawn(chances, uniforms)
    chosen = chances.gather(1, tokens).log()
    if among is not None and sampling.of_what_is_left:
        chosen -= among.log()
    return tokens.squeeze(1), chosen.squeeze(1)


def drawn(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Column (B, 1) at which each row's cumulative weight passes its uniform number. Weights (B, V) ≥ 0.

    In two steps, the part of the row in which that happens and the column in the part: so only sums of parts, and one part of each row,
    are added up in double precision, which would take as long as the softmax. Below 1 in 10¹⁵ it makes no difference.
    """
    if left_over := weights.shape[1] % PART:
        weights = pad(weights, (0, PART - left_over))
    parts = weights.unflatten(1, (-1, PART))
    upto = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniforms.double()[:, None] * upto[:, -1:]
    part = torch.searchsorted(upto, wanted, right=True)
    before = pad(upto, (1, 0)).gather(1, part)
    within = parts.gather(1, part[:, :, None].expand(-1, -1, PART)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # the part's own sum may be rounded otherwise: the column is among those that have weight
    most = within[:, -1:].nextafter(torch.zeros_like(wanted))
    return part * PART + torch.searchsorted(within, torch.minimum(wanted - before, most), right=True)


def _narrowed(chances: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """As `drawn`, among the likeliest tokens only; and their sum (B, 1)."""
    chances, order = chances.topk(min(sampling.top_k or chances.shape[1], chances.shape[1]))
    if sampling.top_p < 1:
        # the token that crosses the bound belongs to the nucleus
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= sampling.top_p, 0)
    return order.gather(1, drawn(chances, uniforms)), chances.sum(-1, keepdim=True)
