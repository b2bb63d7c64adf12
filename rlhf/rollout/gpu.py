"""Attention of a decoding step on a GPU: of one new token of each answer, to what its slot holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.kernels import kernels
from rlhf.models import ragged
from rlhf.models.options import Options, weigh

# query (B, Q, 1, D), new key and value (B, H, 1, D), the slots' keys and values (slots, H, T, D), lengths (B,), scale → (B, Q, 1, D)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
Draw = Callable[
    [Tensor, Tensor, float], tuple[Tensor, Tensor]
]  # logits (B, V), uniforms (B,), temperature → tokens and log-probabilities (B,)


def attend_at_once() -> Attention:
    """Attention of a decoding step on a GPU: the kernel made for it, or torch's."""
    found = kernels("attention")
    return found.attend if found else attend_by_torch


def attend_by_torch(query: Tensor, new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """What `attend` of rlhf/kernels/attention.py does, by the kernels that prompts are read with."""
    rows, heads, _, width = query.shape
    sharing, capacity = key.shape[1:3]
    group = heads // sharing
    _put(new_key, new_value, key, value, lengths)
    # heads that share keys stand where the tokens of a sequence would
    queries = query.view(rows, sharing, group, width).transpose(1, 2).reshape(-1, sharing, width)
    keys, values = (held[:rows].transpose(1, 2).reshape(-1, sharing, width) for held in (key, value))
    starts, key_starts = (torch.arange(0, (rows + 1) * step, step, dtype=torch.int32, device=query.device) for step in (group, capacity))
    used = (lengths + 1).int()
    found = ragged.attend(queries, keys, values, starts, key_starts, group, capacity, scale=scale, causal=False, used=used)
    return found.view(rows, group, sharing, width).transpose(1, 2).reshape(rows, heads, 1, width)


def attend_with_options(
    query: Tensor, new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor, lengths: Tensor, options: Options
) -> Tensor:
    """The same where a layer asks for what no kernel knows (rlhf/models/options.py): over all that slots have room for."""
    rows, capacity = len(query), key.shape[2]
    _put(new_key, new_value, key, value, lengths)
    at, last = torch.arange(capacity, device=query.device), lengths[:, None]
    held = at <= last
    if window := options.narrower(capacity):
        held &= at > last - window
    return weigh(query, key[:rows], value[:rows], held[:, None, None], options)


def _put(new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> None:
    slots = torch.arange(len(new_key), device=key.device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # no place is written to twice, and the way that allows for it is slow
    for held, new in ((key, new_key), (value, new_value)):
        held[slots, :, lengths] = new[:, :, 0]
    torch.use_deterministic_algorithms(before)
