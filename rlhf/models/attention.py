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
from rlhf.models import blocks, ragged
from rlhf.models.blocks import Blocks
from rlhf.models.last_layer import LastLayer
from rlhf.models.options import ANOTHER, Options, options_of, seen, weigh
from rlhf.models.pieces import Piece, Ragged, seen_by

NAME = "packed"  # under which transformers' models find `attend`


def attend_to_pieces(model: PreTrainedModel) -> None:
    """Have a model that attends by what transformers calls an attention interface take packed rows.

    Raises:
        UserError: its attention is its own, and knows nothing of pieces.
    """
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UserError(
            f"a model of type {model.config.model_type} has an attention of its own, which cannot take packed rows",
            remedy=ANOTHER,
        )
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # for a loss of experts, over masks that packed rows have not: it is not added
    LastLayer(model)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pieces: Sequence[Piece] | Blocks | Ragged | None = None,
    read: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within the pieces of a packed row: query (1, Q, N, D), key and value (1, H, N, D) → (1, N, Q, D).

    Each group of Q / H heads of queries shares keys and values, which are not repeated for it.

    Args:
        pieces: of the row, left to right, or laid out for a CPU or for a GPU's kernels; None: ordinary rows
            with a mask, which go the usual way.
        read: (n,) places of the tokens whose outputs are read; None: all.

    Raises:
        UserError: the row is packed, and the model did not hand its pieces on; the layer asks for what is not applied here.
    """
    asked = options_of(module, options)
    if pieces is None:
        return _attend_to_rows(module, query, key, value, attention_mask, asked, options), None
    if attention_mask is None or attention_mask.numel():
        raise UserError(
            f"a layer of this model ({type(module).__name__}) has a mask of its own, which packed rows have not", remedy=ANOTHER
        )
    plain = asked.plain and not isinstance(pieces, Sequence) and not asked.narrower(pieces.longest_keys)
    if plain and isinstance(pieces, Blocks) and query.dtype == torch.bfloat16:
        found = blocks.attend(query, key, value, pieces, asked.scale)
    elif plain and isinstance(pieces, Ragged) and value.shape[-1] == query.shape[-1]:
        found = _attend_at_once(query, key, value, pieces, asked.scale)
    else:
        found = _attend_in_turn(query, key, value, pieces if isinstance(pieces, Sequence) else pieces.pieces, asked)
    if last := getattr(module, "last_layer", None):
        last.attended(read, query.shape[2])
    return found, None


def _attend_to_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, asked: Options, options: dict[str, Any]
) -> Tensor:
    if mask is not None and not mask.numel():
        raise UserError(
            "a layer of this model does not hand on to its attention what the model is called with, so that it cannot take packed rows",
            remedy=ANOTHER,
        )
    if asked.plain:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    if mask is None:
        mask = seen(query.shape[2], key.shape[2], None, query.device)
    return weigh(query, key, value, mask, asked).transpose(1, 2)


def _attend_in_turn(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], asked: Options) -> Tensor:
    # split, not slices: the gradient of each slice would be as large as the row
    queries, keys, values = (states.split([piece.length for piece in pieces], dim=2) for states in (query, key, value))
    found = []
    for number, piece in enumerate(pieces):
        k, v = keys[number], values[number]
        if piece.after is not None:
            k, v = (torch.cat([states[i] for i in seen_by(pieces, number)], dim=2) for states in (keys, values))
        found.append(_attend_to_one(queries[number], k, v, asked).transpose(1, 2))
    return torch.cat(found, dim=1)


def _attend_to_one(query: Tensor, key: Tensor, value: Tensor, asked: Options) -> Tensor:
    """Of a piece's queries to all keys that its last one sees."""
    window, follows = asked.narrower(key.shape[2]), query.shape[2] < key.shape[2]
    mask = seen(query.shape[2], key.shape[2], window, query.device) if follows or window is not None or not asked.plain else None
    if mask is not None and not asked.plain:
        return weigh(query, key, value, mask, asked)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=asked.scale, enable_gqa=grouped)


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, row: Ragged, scale: float | None) -> Tensor:
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if row.keys is not None:
        keys, values = (states.index_select(0, row.keys) for states in (keys, values))
    layout = (row.starts, row.key_starts, row.longest, row.longest_keys)
    return ragged.attend(queries, keys, values, *layout, scale=scale, causal=True)[None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # of ordinary rows
