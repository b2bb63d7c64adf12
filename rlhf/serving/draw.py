"""One token for each row, each by its own sampling. No row's result hangs on how many others there are, not even in its last bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.rollout.sampling import COLDEST, PART, drawn, from_heaviest, nucleus


def draw(logits: Tensor, uniforms: Tensor, temperatures: Sequence[float], top_ps: Sequence[float]) -> list[int]:
    """Tokens by inverse-CDF sampling, as `rlhf.rollout.sampling.sample` draws them. Logits (B, V) fp32, uniforms (B,) on the CPU.

    Raises:
        ArithmeticError: a row has no probabilities.
    """
    likeliest = logits.argmax(-1)
    if not logits.gather(1, likeliest[:, None]).isfinite().all():  # to argmax nothing is larger than NaN
        raise ArithmeticError("the model gives logits that are NaN or infinite")
    warm = [row for row, temperature in enumerate(temperatures) if temperature >= COLDEST]
    if warm:
        scaled = logits[warm] / torch.tensor([temperatures[row] for row in warm], device=logits.device)[:, None]
        weights = scaled.softmax(-1)
        given = uniforms[warm].to(logits.device)
        tokens = drawn(weights, given).squeeze(1)
        if narrow := [place for place, row in enumerate(warm) if top_ps[row] < 1]:
            bounds = torch.tensor([top_ps[warm[place]] for place in narrow], device=logits.device)
            tokens[narrow] = _from_nucleus(weights[narrow], given[narrow], bounds)
        likeliest[warm] = tokens
    return likeliest.tolist()


def _from_nucleus(weights: Tensor, uniforms: Tensor, bounds: Tensor) -> Tensor:
    """Among the likeliest tokens of each row that have so much of its mass together, the one that crosses the bound included."""
    if weights.device.type == "cpu":
        return from_heaviest(weights, uniforms, bounds[:, None], weights.shape[1])[0].squeeze(1)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    return order.gather(1, drawn(nucleus(ordered, bounds[:, None]), uniforms)).squeeze(1)


def log_probs(logits: Tensor) -> Tensor:
    """Of each token, (B, V). Sums are made part by part: torch adds one long row up otherwise than several."""
    above = logits - logits.amax(-1, keepdim=True)
    weights = above.exp()
    parts = pad(weights, (0, -weights.shape[1] % PART)).unflatten(1, (-1, PART))
    return above - parts.sum(-1, dtype=torch.float64).sum(-1, keepdim=True).log().float()
