"""Attention of sequences of any lengths side by side on a GPU, in one kernel: no padding, and no launch for each of them.

These are the kernels of torch that its `scaled_dot_product_attention` calls, and torch knows their gradients. Under torch's deterministic
algorithms both give the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

FROM_THE_END = 2  # the efficient kernel's name for: the last query sees all keys, the one before it all but the last one, …
WIDEST = 256  # of the flash kernel, numbers per head


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float | None,
    causal: bool,
    used: Tensor | None = None,
) -> Tensor:
    """Attention of B sequences: query (N, Q, D) to key and value (M, H, D), each shared by Q / H heads of queries → (N, Q, D).

    Args:
        starts, key_starts: (B + 1,) int32: the first query and the first key of each sequence, and the end.
        longest, longest_keys: of a sequence, at most.
        causal: the last query of a sequence sees all of its keys, the one before it all but the last, and so on.
        used: (B,) int32: how many of its keys each sequence has in use, from the first one on; None: all.
    """
    width = query.shape[-1]
    if query.dtype != torch.float32 and width <= WIDEST and width % 8 == 0:
        layout = (starts, key_starts, longest, longest_keys, 0.0, causal, False)
        return torch.ops.aten._flash_attention_forward(query, key, value, *layout, scale=scale, seqused_k=used)[0]
    heads = query.shape[1]
    key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    sequences = (query[None], key[None], value[None])
    mask = FROM_THE_END if causal else 0
    options = (None, starts, key_starts, longest, longest_keys, 0.0, mask, torch.is_grad_enabled())
    return torch.ops.aten._efficient_attention_forward(*sequences, *options, scale=scale, seqlen_k=used)[0][0]
