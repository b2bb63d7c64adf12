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
    warm = [row for row, temperature in enumerate(temperatures) if temperature >= COLDEST]
    if len(warm) == len(temperatures):
        return _draw(logits, uniforms, temperatures, top_ps).tolist()
    tokens = logits.argmax(-1)
    _check(logits.gather(1, tokens[:, None]))  # to argmax nothing is larger than NaN
    if warm:
        given = ([values[row] for row in warm] for values in (temperatures, top_ps))
        tokens[warm] = _draw(logits[warm], uniforms[warm], *given)
    return tokens.tolist()


def _draw(logits: Tensor, uniforms: Tensor, temperatures: Sequence[float], top_ps: Sequence[float]) -> Tensor:
    device = logits.device
    if set(temperatures) != {1.0}:
        logits = logits / torch.tensor(temperatures, device=device)[:, None]
    weights, given = logits.softmax(-1), uniforms.to(device)
    _check(weights[:, 0])  # where one logit of a row is NaN or infinite, all its weights are NaN
    tokens = drawn(weights, given).squeeze(1)
    if narrow := [row for row, top_p in enumerate(top_ps) if top_p < 1]:
        bounds = torch.tensor([top_ps[row] for row in narrow], device=device)
        tokens[narrow] = _from_nucleus(weights[narrow], given[narrow], bounds)
    return tokens


def _check(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise ArithmeticError("the model gives logits that are NaN or infinite")


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
