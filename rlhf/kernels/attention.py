"""A decoding step's attention.

Attention of one token per answer takes as long as keys and values take to be read. The kernels that torch has for whole sequences work on
128 queries at a time, of which one would count here, and their arithmetic takes several times as long as the reading (LOG.md). This one
has a program for each answer and each head of keys, which reads them once for all queries that share them, and as far as the answer goes.
It also writes the new token's keys and values to their place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS, BYTES = 64, 2**15  # that a program reads at a time, at most: some such parts must fit where it works
LEAST = 16  # rows and columns of a matrix product
LOG2_E = 1.4426950408889634


def try_out() -> None:
    tiny = torch.zeros(1, 1, 1, 16, device="cuda")
    attend(tiny, tiny, tiny, tiny.clone(), tiny.clone(), torch.zeros(1, dtype=torch.long, device="cuda"), 1.0)


def attend(query: Tensor, new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Add each answer's new token to its slot, and attend to all that the slot holds then → (B, Q, 1, D).

    Args:
        query: (B, Q, 1, D), of the new tokens.
        new_key, new_value: (B, H, 1, D); Q / H heads of queries share each.
        key, value: (slots, H, T, D), to be written to.
        lengths: (B,) tokens that each slot held before.
    """
    rows, heads, _, width = query.shape
    group = heads // new_key.shape[1]
    found = torch.empty(rows, heads, 1, width, dtype=query.dtype, device=query.device)
    wide = max(LEAST, triton.next_power_of_2(width))
    strides = [stride for states in (query, new_key, new_value) for stride in states.stride()[:2]]
    strides += [stride for states in (key, value) for stride in states.stride()[:3]]
    _kernel[(rows, new_key.shape[1])](
        query,
        new_key,
        new_value,
        key,
        value,
        lengths,
        found,
        scale * LOG2_E,
        *strides,
        GROUP=group,
        GROUP_2=max(LEAST, triton.next_power_of_2(group)),
        WIDTH=width,
        WIDTH_2=wide,
        KEYS=min(KEYS, BYTES // (wide * key.element_size())),
    )
    return found


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]  # its types are Triton's
    query,
    new_key,
    new_value,
    key,
    value,
    lengths,
    found,
    scale,
    query_row,
    query_head,
    new_key_row,
    new_key_head,
    new_value_row,
    new_value_head,
    key_slot,
    key_head,
    key_token,
    value_slot,
    value_head,
    value_token,
    GROUP: tl.constexpr,  # noqa: N803
    GROUP_2: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    WIDTH_2: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    """Softmax is taken as keys come: the largest score so far, and sums that are scaled down when a larger one comes (arXiv 1805.02867)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    at, member = tl.arange(0, WIDTH_2), tl.arange(0, GROUP_2)
    inside = at < WIDTH
    heads = head * GROUP + member
    queries = (member < GROUP)[:, None] & inside[None, :]

    k = tl.load(new_key + row * new_key_row + head * new_key_head + at, mask=inside, other=0.0)
    v = tl.load(new_value + row * new_value_row + head * new_value_head + at, mask=inside, other=0.0)
    keys, values = key + row * key_slot + head * key_head, value + row * value_slot + head * value_head
    tl.store(keys + length * key_token + at, k, mask=inside)
    tl.store(values + length * value_token + at, v, mask=inside)

    q = tl.load(query + row * query_row + heads[:, None] * query_head + at[None, :], mask=queries, other=0.0)
    largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    total = tl.full((GROUP_2,), 1.0, tl.float32)
    summed = tl.zeros((GROUP_2, WIDTH_2), tl.float32) + v.to(tl.float32)[None, :]
    for first in range(0, length, KEYS):
        token = first + tl.arange(0, KEYS)
        held = token < length
        held_keys = tl.load(keys + token[None, :] * key_token + at[:, None], mask=held[None, :] & inside[:, None], other=0.0)
        held_values = tl.load(values + token[:, None] * value_token + at[None, :], mask=held[:, None] & inside[None, :], other=0.0)
        scores = tl.where(held[None, :], tl.dot(q, held_keys, input_precision="ieee") * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, shrunk = tl.exp2(scores - larger[:, None]), tl.exp2(largest - larger)
        total = total * shrunk + tl.sum(weights, 1)
        summed = tl.dot(weights.to(held_values.dtype), held_values, summed * shrunk[:, None], input_precision="ieee")
        largest = larger
    mean = (summed / total[:, None]).to(found.dtype.element_ty)
    tl.store(found + (row * tl.num_programs(1) * GROUP + heads[:, None]) * WIDTH + at[None, :], mean, mask=queries)
