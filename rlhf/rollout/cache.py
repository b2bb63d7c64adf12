"""Keys and values of the answers in the making, in tensors that are made once.

Each answer has a slot: its tokens' keys and values from column 0 on. A slot that falls free is filled again, from the last one or with a
new prompt, so that the slots in use are always the first ones and a decoding step reads them without copying. What they hold is attended to
span by span on a CPU, where keys lie dimension by dimension, and on a GPU in one kernel that is told how much of each slot is in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from rlhf.models import attention
from rlhf.models.options import Options, options_of, weigh
from rlhf.models.packed import Packed
from rlhf.rollout.gpu import attend_at_once, attend_with_options

ATTENTION = "rollout"  # name under which transformers' models find `attend`
SPAN = 16  # slots that attend in one call, to as many columns as the longest of them fills
WASTE = 1.25  # times the columns of the spans that one call over all slots may read: each call costs as much as some slots
FEW = 3  # queries of one slot up to which MKL adds up all columns one after the other, whatever their number
COLUMNS = 16  # a span's width is a multiple of so many: a whole vector, and oneDNN makes a program for each width
Layer = tuple[Tensor, Tensor]  # keys and values of one layer


class SlotCache:
    """What a transformers model takes as `past_key_values`.

    Args:
        slots: answers at a time.
        capacity: tokens of the longest prompt with its answer.
        alone: on a CPU, no bit of what a slot gives may hang on its neighbours or their lengths: a masked column adds nothing, whole
            vectors of columns are added up alike, and FEW queries go at a time; with options that no kernel knows, one slot.
    """

    def __init__(self, slots: int, capacity: int, *, alone: bool = False) -> None:
        self.slots, self.capacity, self.alone = slots, -(-capacity // COLUMNS) * COLUMNS, alone
        self.layers: list[Layer] = []  # (slots, H, capacity, D) each; keys of a CPU lie as (slots, H, D, capacity)
        self.fresh: list[Layer] | None = None  # (1, H, N, D) each, while prompts are read
        self.lengths = torch.empty(0, dtype=torch.long)  # (B,) tokens in each slot in use
        self.width = 0  # columns that a decoding step reads
        self.spans: list[tuple[slice, int]] = []  # slots of each and its width

    @contextmanager
    def reading(self) -> Iterator[list[Layer]]:
        """The forward pass inside the block is over packed prompts; gives what each layer makes of them."""
        self.fresh = []
        try:
            yield self.fresh
        finally:
            self.fresh = None

    def decode(self, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Get ready for a forward pass over one more token of each slot in use; gives what the model is called with for it.

        Args:
            lengths: tokens that each slot in use holds already.
        """
        self.lengths, self.width = torch.tensor(lengths, device=device), _columns(lengths)
        hidden = torch.arange(self.width, device=device) > self.lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        self.spans = self._spans(lengths)
        return {"position_ids": self.lengths[:, None], "attention_mask": mask[:, None, None], "held": self}

    def _spans(self, lengths: Sequence[int]) -> list[tuple[slice, int]]:
        spans = [slice(first, min(first + SPAN, len(lengths))) for first in range(0, len(lengths), SPAN)]
        found = [(span, _columns(lengths[span])) for span in spans]
        least = sum((span.stop - span.start) * columns for span, columns in found)
        whole = self.alone and len(lengths) * self.width <= WASTE * least
        return [(slice(0, len(lengths)), self.width)] if whole else found

    def decode_at_once(self, lengths: Tensor) -> dict[str, Any]:
        """The same on a GPU. Nothing but the number of slots decides what will be computed, so that it can be captured.

        Args:
            lengths: (B,) tokens that each slot in use holds already, on the GPU.
        """
        self.lengths = lengths
        unfit = torch.empty(1, 1, 0, 0, device=lengths.device)  # as in a packed row's inputs
        return {"position_ids": lengths[:, None], "attention_mask": unfit, "held": self}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Layer:
        """Called by each layer of attention with what is new, (B, H, T, D); gives it what to attend to."""
        if self.fresh is not None:
            self.fresh.append((keys, values))
        if self.fresh is not None or keys.device.type != "cpu":  # where `attend` puts them into their slots
            return keys, values
        slots = torch.arange(len(keys))
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept[slots, :, self.lengths] = new[:, :, 0]
        held_keys, held_values = self.layers[layer]
        return held_keys[: len(keys), :, : self.width], held_values[: len(keys), :, : self.width]

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked by some models, which need no answer as they are given positions."""
        return 0

    def place(self, slot: int, prompt: Sequence[Layer]) -> None:
        """Fill a slot with a prompt's keys and values, (H, T, D) of each layer."""
        if not self.layers:
            self.layers = [(self._room(keys, by_dimension=True), self._room(values)) for keys, values in prompt]
        for layer, parts in zip(self.layers, prompt, strict=True):
            for kept, part in zip(layer, parts, strict=True):
                kept[slot, :, : part.shape[1]] = part

    def _room(self, like: Tensor, *, by_dimension: bool = False) -> Tensor:
        """Zeros (slots, H, capacity, D) for keys or values like (H, T, D): what is masked must be finite, as 0 · NaN is NaN."""
        heads, _, width = like.shape
        if like.device.type != "cpu":  # token by token, as torch's kernels take them, which know no slots
            return like.new_zeros(self.slots, self.capacity, heads, width).transpose(1, 2)
        shape = (self.slots, heads, *((width, self.capacity) if by_dimension else (self.capacity, width)))
        # numpy's zeros come from the system, which makes pages of them as they are written: short answers leave most of it untouched
        room = torch.from_numpy(np.zeros(math.prod(shape) * like.dtype.itemsize, np.uint8)).view(like.dtype).view(shape)
        return room.mT if by_dimension else room

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot into another one."""
        for layer in self.layers:
            for kept in layer:
                kept[target, :, :length] = kept[source, :, :length]


def _columns(lengths: Sequence[int]) -> int:
    return -(-(max(lengths) + 1) // COLUMNS) * COLUMNS


def parts_of(packed: Packed, layers: Sequence[Layer], number: int) -> list[Layer]:
    """The keys and values (H, T, D) of one sequence, in all layers' (1, H, N, D) of a packed row."""

    def part_of(states: Tensor) -> Tensor:
        parts = [states[0, :, run] for run in packed.runs[number]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return [(part_of(keys), part_of(values)) for keys, values in layers]


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Have a model attend by `attend` inside the block, and as before after it."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    held: SlotCache | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one query (B, Q, 1, D) per slot to keys and values (B, H, T, D), each shared by Q / H heads of queries.

    Decoding takes as long as keys and values take to be read, so none is read in vain. transformers' own attention repeats them for each
    head of queries, which copies the whole cache at each token: here the heads that share keys stand where the tokens of a sequence would.
    And each span of slots, on a GPU each slot, has its own width.

    Args:
        held: the slots; on a GPU key and value are only what is new. Not given while prompts are read.
    """
    if held is None:
        return attention.attend(module, query, key, value, attention_mask, **options)
    asked = options_of(module, options)
    if query.device.type == "cpu":
        return _attend_in_spans(query, key, value, attention_mask, held, asked), None
    keys, values = held.layers[module.layer_idx]
    if asked.plain and not asked.narrower(held.capacity) and value.shape[-1] == query.shape[-1]:
        scale = asked.scale or query.shape[-1] ** -0.5
        return attend_at_once()(query, key, value, keys, values, held.lengths, scale).transpose(1, 2), None
    return attend_with_options(query, key, value, keys, values, held.lengths, asked).transpose(1, 2), None


def _attend_in_spans(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, held: SlotCache, asked: Options) -> Tensor:
    rows, heads, _, width = query.shape
    if window := asked.narrower(held.width):
        before = torch.arange(held.width) <= (held.lengths - window)[:, None]
        mask = mask.masked_fill(before[:, None, None], float("-inf"))
    if not asked.plain:
        return _weigh_in_spans(query, key, value, mask, held, asked).transpose(1, 2)
    grouped = query.reshape(rows, key.shape[1], -1, width)
    most = FEW if held.alone else grouped.shape[2]
    if len(held.spans) == 1 and grouped.shape[2] <= most:
        return _attend_to_span(grouped, key, value, mask, asked.scale).reshape(rows, 1, heads, value.shape[-1])
    found = grouped.new_empty(*grouped.shape[:-1], value.shape[-1])
    slices = [slice(first, first + most) for first in range(0, grouped.shape[2], most)]
    for part, columns in held.spans:
        inputs = (key[part, :, :columns], value[part, :, :columns], mask[part, ..., :columns])
        for some in slices:
            found[part, :, some] = _attend_to_span(grouped[part, :, some], *inputs, asked.scale)
    return found.reshape(rows, 1, heads, value.shape[-1])


def _weigh_in_spans(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, held: SlotCache, asked: Options) -> Tensor:
    found, size = list[Tensor](), 1 if held.alone else SPAN
    for lengths in held.lengths.split(size):
        part, width = slice(first := size * len(found), first + size), _columns(lengths.tolist())
        found.append(weigh(query[part], key[part, :, :width], value[part, :, :width], mask[part, ..., :width], asked))
    return torch.cat(found)


def _attend_to_span(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Query (B, H, G, D) to keys and values (B, H, T, D). Scores are fp32, as in rlhf/models/blocks.py; torch's kernel takes longer, over
    bfloat16 three to eight times as long."""
    queries, keys, values = (states.flatten(0, 1) for states in (query, key, value))
    scores = torch.bmm(queries.float(), keys.mT.float()).view(*query.shape[:3], -1)
    chances = torch.softmax(scores.mul_(scale or query.shape[-1] ** -0.5).add_(mask), -1)
    return torch.bmm(chances.flatten(0, 1).to(value.dtype), values).view(*query.shape[:3], -1)


AttentionInterface.register(ATTENTION, attend)
