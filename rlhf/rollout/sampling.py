"""How a token is drawn: one uniform number per token, and the inverse of the cumulative distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.kernels import kernels

PART = 128  # columns
COLDEST = 1e-3  # temperature below which the likeliest token is taken: a division would overflow
NUCLEUS = 1024  # columns that are put into order first: a model that has learnt to write seldom needs more
SLACK = 1e-6  # of mass; sums in fp32 are off by less


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0, or below COLDEST: the likeliest token."""

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
    narrow what is drawn; or that of the distribution drawn from, where `sampling` asks for it. A row without probabilities, as one of its
    logits is NaN or ∞, gives any token and NaN.
    """
    warm = sampling.temperature >= COLDEST
    plain = warm and not sampling.top_k and sampling.top_p == 1
    if plain and logits.device.type == "cuda" and (found := kernels("drawing")):
        return cast(tuple[Tensor, Tensor], found.draw(logits, uniforms, sampling.temperature))
    logits = logits.float()
    if warm and sampling.temperature != 1:
        logits = logits / sampling.temperature
    chances = logits.softmax(-1)  # at once: on a CPU a row stays in its cache
    among: Tensor | None = None
    if not warm:
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
    columns = weights.shape[1]
    if left_over := columns % PART:
        weights = pad(weights, (0, PART - left_over))
    parts = weights.unflatten(1, (-1, PART))
    upto = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniforms.double()[:, None] * upto[:, -1:]
    part = torch.searchsorted(upto, wanted, right=True).clamp_(max=parts.shape[1] - 1)  # it is beyond in a row of NaN
    before = pad(upto, (1, 0)).gather(1, part)
    within = parts.gather(1, part[:, :, None].expand(-1, -1, PART)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # the part's own sum may be rounded otherwise: the column is among those that have weight
    most = within[:, -1:].nextafter(torch.zeros_like(wanted))
    place = torch.searchsorted(within, torch.minimum(wanted - before, most), right=True)
    return (part * PART + place).clamp_(max=columns - 1)


def _narrowed(chances: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """As `drawn`, among the likeliest tokens only; and their sum (B, 1)."""
    most = min(sampling.top_k or chances.shape[1], chances.shape[1])
    bound = sampling.top_p if sampling.top_p < 1 else math.inf
    if chances.device.type == "cpu":
        bounds = chances.new_full((len(chances), 1), bound)
        return from_heaviest(chances, uniforms, bounds, most, NUCLEUS if sampling.top_p < 1 else most)
    chances, order = chances.topk(most)
    if sampling.top_p < 1:
        chances = nucleus(chances, bound)
    return order.gather(1, drawn(chances, uniforms)), chances.sum(-1, keepdim=True)


def nucleus(ordered: Tensor, bounds: Tensor | float) -> Tensor:
    """Weights (B, K), the largest first, with 0 for those before which the bound is reached: the one that crosses it is left."""
    return ordered.masked_fill(ordered.cumsum(-1) - ordered >= bounds, 0)


def from_heaviest(weights: Tensor, uniforms: Tensor, bounds: Tensor, most: int, first: int = NUCLEUS) -> tuple[Tensor, Tensor]:
    """On a CPU: columns (B, 1) drawn among the heaviest of each row, and the sum (B, 1) of these. Of columns alike the first come first.

    numpy sorts numbers by whole vectors, in a thirtieth of the time that torch takes to put columns into order. So a weight is drawn, and
    then it is looked up where it stands. And few columns are sorted, where those hold the nucleus.

    Args:
        weights: (B, V) ≥ 0.
        bounds: (B, 1) mass of the nucleus; ∞: all.
        most: columns among which it is.
        first: columns that are sorted at first.
    """
    ordered = _largest(weights, min(first, most))
    kept = nucleus(ordered, bounds)
    place = drawn(kept, uniforms)
    chosen = kept.gather(1, place)
    alike = place - (ordered > chosen).sum(-1, keepdim=True)  # how many of the same weight come before it
    found = zip(weights.numpy(), chosen.numpy(), alike.squeeze(1).tolist(), strict=True)
    columns = torch.tensor([next(islice(np.flatnonzero(row == one), number, None), 0) for row, one, number in found])[:, None]
    masses = kept.sum(-1, keepdim=True)
    wide = (ordered.sum(-1, keepdim=True, dtype=torch.float64) < bounds + SLACK).squeeze(1).nonzero().squeeze(1)
    if first < most and len(wide):
        columns[wide], masses[wide] = from_heaviest(weights[wide], uniforms[wide], bounds[wide], most, most)
    return columns, masses


def _largest(weights: Tensor, count: int) -> Tensor:
    """The largest of each row (B, V), in order: (B, count)."""
    rows, left = weights.numpy(), weights.shape[1] - count
    return torch.from_numpy(np.sort(np.partition(rows, left, axis=1)[:, left:] if left else rows, axis=1)).flip(1)
