"""Packed rows: the sequences of a micro-batch laid side by side in one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf.models.blocks import Blocks
from rlhf.models.pieces import Piece, Ragged
from rlhf.tensors import send

SHARED = 16  # tokens: a piece of its own costs some operations in each layer, which fewer would hardly save


@dataclass(frozen=True)
class Packed:
    """Sequences laid side by side in one row, so that no work is done on padding. None sees another (rlhf/models/attention.py).

    What sequences begin alike with stands there once: a system prompt, or the prompt of a preference pair or of several answers. Each one's
    own part sees it and itself.

    It stands in the processor's memory; what a model needs of it is sent to the model's device, where nothing waits for it.
    """

    device: torch.device  # of the model
    ids: Tensor  # (1, N)
    positions: Tensor  # (1, N) counted from each sequence's own start
    pieces: Sequence[Piece]  # in the order of the row
    runs: Sequence[Sequence[slice]]  # B: where each sequence stands in the row, beginning first
    places: Tensor  # (B, T) the same for each token; 0 beyond its end
    lengths: Tensor  # (B,)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with; one that does not hand the pieces on to its attention is known by the mask, which fits nothing."""
        return {
            "input_ids": send(self.ids, self.device),
            "position_ids": send(self.positions, self.device),
            "attention_mask": torch.empty(1, 1, 0, 0, device=self.device),
            "pieces": Blocks(self.pieces) if self.device.type == "cpu" else Ragged.of(self.pieces, self.device),
        }

    def read_at(self, places: Tensor) -> dict[str, Any]:
        """`inputs` of a forward pass of which nothing is read but what it makes at some places of the row."""
        read = places.unique()
        return self.inputs | ({"read": send(read, self.device)} if 2 * len(read) <= self.ids.shape[1] else {})

    @property
    def last(self) -> Tensor:
        """(B,) place of each sequence's last token in the row."""
        return self.places.gather(1, self.lengths[:, None] - 1).squeeze(1)

    def predictions(self, masks: Sequence[Sequence[int]]) -> Predictions:
        """Where the tokens with mask 1 are predicted, sequence by sequence; a sequence's first token is never."""
        row, token = pad_rows([[0, *mask[1:]] for mask in masks], 0).nonzero(as_tuple=True)
        targets = self.ids[0, self.places[row, token]]
        return Predictions(self.places[row, token - 1], send(targets, self.device), send(row, self.device))


@dataclass(frozen=True)
class Predictions:
    """The tokens whose log-probabilities are wanted, n of them: logits are computed for these alone."""

    places: Tensor  # (n,) of the token before each one, whose output predicts it
    targets: Tensor  # (n,) the tokens, on the model's device
    rows: Tensor  # (n,) number of the sequence of each, on the model's device


def pack(sequences: Sequence[Sequence[int]], device: str | torch.device, *, share: bool = True) -> Packed:
    """Lay sequences side by side for a model on a device.

    Args:
        sequences: of tokens.
        device: of the model.
        share: those that begin alike share the beginning.
    """
    row, positions = list[int](), list[int]()
    pieces: list[Piece] = []
    runs: list[list[slice]] = [[] for _ in sequences]

    def lay(group: Sequence[int], first: int, end: int, after: int | None) -> int:
        """Add tokens [first, end) that each of some sequences has; the number of their piece."""
        start = len(row)
        row.extend(sequences[group[0]][first:end])
        positions.extend(range(first, end))
        pieces.append(Piece(end - first, after))
        for i in group:
            runs[i].append(slice(start, len(row)))
        return len(pieces) - 1

    def lay_all(group: Sequence[int], first: int, after: int | None) -> None:
        """Add all tokens from the first one on of sequences whose tokens before it stand in the row already."""
        alike: dict[Any, list[int]] = {}
        for i in group:
            begin = tuple(sequences[i][first : first + SHARED])
            alike.setdefault(begin if share and len(begin) == SHARED else i, []).append(i)
        for some in alike.values():
            if len(some) == 1:
                lay(some, first, len(sequences[some[0]]), after)
                continue
            end = first + begin_alike([tuple(sequences[i][first:]) for i in some])
            shared = lay(some, first, end, after)
            lay_all([i for i in some if len(sequences[i]) > end], end, shared)

    lay_all(range(len(sequences)), 0, None)
    return Packed(
        device=torch.device(device),
        ids=torch.tensor([row]),
        positions=torch.tensor([positions]),
        pieces=pieces,
        runs=runs,
        places=pad_rows([[place for run in each for place in range(run.start, run.stop)] for each in runs], 0),
        lengths=torch.tensor([len(sequence) for sequence in sequences]),
    )


def begin_alike(sequences: Sequence[tuple[int, ...]]) -> int:
    """With how many tokens all of them begin."""
    first, last = min(sequences), max(sequences)  # in order, and what these two begin with stands in all between them
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))


def pad_rows(rows: Sequence[Sequence[float]], value: float) -> Tensor:
    """Rows of different lengths → (B, T), padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
