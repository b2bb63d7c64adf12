"""Attention of packed sequences, piece by piece: no work on what a token does not see, and no mask as wide and as high as the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf.errors import UserError
from rlhf.models import ragged
from rlhf.models.last_layer import LastLayer
from rlhf.models.pieces import Piece, Ragged, seen_by

NAME = "packed"  # under which transformers' models find `attend`


def attend_to_pieces(model: PreTrainedModel) -> None:
    """Have a model that attends by scaled_dot_product_attention take packed rows.

    Raises:
        UserError: its attention is its own, and knows nothing of pieces.
    """
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UserError(
            f"a model of type {model.config.model_type} has an attention of its own, which cannot take packed rows",
            remedy="choose a model of another family (docs/own-model.md)",
        )
    LastLayer(model)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pieces: Sequence[Piece] | Ragged | None = None,
    read: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within the pieces of a packed row: query (1, Q, N, D), key and value (1, H, N, D) → (1, N, Q, D).

    Each group of Q / H heads of queries shares keys and values, which are not repeated for it.

    Args:
        pieces: of the row, left to right, or as a GPU's kernels take them; None: ordinary rows with a mask, which go the usual way.
        read: (n,) places of the tokens whose outputs are read; None: all.

    Raises:
        UserError: the row is packed, and the model did not hand its pieces on.
    """
    if pieces is None:
        if attention_mask is not None and not attention_mask.numel():
            raise UserError(
                "a layer of this model does not hand on to its attention what the model is called with, so that it cannot take packed rows",
                remedy="choose a model of another family (docs/own-model.md)",
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if isinstance(pieces, Ragged):
        found = _attend_at_once(query, key, value, pieces, options.get("scaling"))
    else:
        found = _attend_in_turn(query, key, value, pieces, options.get("scaling"))
    if last := getattr(module, "last_layer", None):
        last.attended(read, query.shape[2])
    return found, None


def _attend_in_turn(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], scale: float | None) -> Tensor:
    # split, not slices: the gradient of each slice would be as large as the row
    queries, keys, values = (states.split([piece.length for piece in pieces], dim=2) for states in (query, key, value))
    found = []
    for number, piece in enumerate(pieces):
        k, v = keys[number], values[number]
        mask = None
        if piece.after is not None:
            k, v = (torch.cat([states[i] for i in seen_by(pieces, number)], dim=2) for states in (keys, values))
            mask = torch.ones(piece.length, k.shape[2], dtype=torch.bool, device=query.device).tril(k.shape[2] - piece.length)
        attended = scaled_dot_product_attention(
            queries[number],
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        found.append(attended.transpose(1, 2))
    return torch.cat(found, dim=1)


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, row: Ragged, scale: float | None) -> Tensor:
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if row.keys is not None:
        keys, values = (states.index_select(0, row.keys) for states in (keys, values))
    layout = (row.starts, row.key_starts, row.longest, row.longest_keys)
    return ragged.attend(queries, keys, values, *layout, scale=scale, causal=True)[None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # of ordinary rows
