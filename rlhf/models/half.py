"""Attention of a piece in half precision on a CPU, as matrix products of a block of queries with all keys that it sees.

A processor with products in bfloat16 is quick at these. torch's own kernel takes three to five times as long, most of it in the backward
pass, and the more so, the shorter the pieces are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 128  # queries: what more of them make does not stay in a core's cache, and fewer skip little of what no query sees


def suits(query: Tensor, value: Tensor) -> bool:
    """Whether this is the quicker way: a processor's products in float16 are slow ones."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention; `scale` of the products of queries and keys, None: 1/√D."""
    return cast(Tensor, HalfAttention.apply(query, key, value, scale if scale is not None else query.shape[-1] ** -0.5))


class HalfAttention(torch.autograd.Function):
    """Causal attention, query (1, Q, N, D) to key and value (1, H, M, D), N ≤ M → (1, Q, N, D). The last query sees all M keys.

    Each of the H heads of keys serves Q / H heads of queries. Scores and chances are fp32, as are the sums within each product; what a
    product makes of them is rounded once. Nothing is kept for the backward pass but what came in: it computes the chances again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        found = torch.empty_like(query)
        for at, seen, _, chances in _blocks(query, key, scale):
            found[:, :, at] = torch.bmm(chances.to(value.dtype), value[0, :, :seen]).view_as(found[:, :, at])
        return found

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(states[0], dtype=torch.float32) for states in (key, value))
        for at, seen, queries, chances in _blocks(query, key, ctx.scale):
            slope = _grouped(slopes[0][:, :, at], key)
            of_value[:, :seen] += torch.bmm(chances.to(value.dtype).mT, slope)
            of_chances = torch.bmm(slope, value[0, :, :seen].mT).float()
            of_scores = torch._softmax_backward_data(of_chances, chances, -1, torch.float32).mul_(ctx.scale).to(query.dtype)
            of_query[:, :, at] = torch.bmm(of_scores, key[0, :, :seen]).view_as(of_query[:, :, at])
            of_key[:, :seen] += torch.bmm(of_scores.mT, queries)
        return of_query, of_key[None].to(key.dtype), of_value[None].to(value.dtype), None


def _blocks(query: Tensor, key: Tensor, scale: float) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Blocks of queries: which they are, how many keys they see, themselves, and their chances (H, Q / H · n, keys), fp32."""
    queries, keys = query.shape[2], key.shape[2]
    whole = key[0].float()
    for first in range(0, queries, BLOCK):
        at = slice(first, min(first + BLOCK, queries))
        rows, seen = at.stop - first, keys - queries + at.stop
        unseen = whole.new_zeros(query.shape[1] // key.shape[1], rows, seen)
        unseen[:, :, seen - rows :] = whole.new_full((rows, rows), -math.inf).triu_(1)
        some = _grouped(query[:, :, at], key)
        scores = torch.baddbmm(unseen.view(1, -1, seen), some.float(), whole[:, :seen].mT, alpha=scale)
        yield at, seen, some, torch.softmax(scores, -1)


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """(1, Q, n, D) → (H, Q / H · n, D): side by side what shares a head of keys."""
    return states.reshape(key.shape[1], -1, states.shape[-1])
