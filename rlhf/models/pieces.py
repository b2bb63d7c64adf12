"""What a packed row consists of: pieces, of which each sees itself and what it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rlhf.tensors import send


@dataclass(frozen=True)
class Piece:
    """Tokens that stand side by side in a packed row. Each sees those before it in its piece, and all of what its piece follows."""

    length: int
    after: int | None  # number of the piece that it follows, which may follow another one; None: it is a sequence's beginning


def seen_by(pieces: Sequence[Piece], number: int) -> list[int]:
    """Numbers of a piece and of those that it follows, the first one first."""
    seen = [number]
    while (after := pieces[seen[0]].after) is not None:
        seen.insert(0, after)
    return seen


@dataclass(frozen=True)
class Ragged:
    """The pieces of a row as kernels take them that attend in all of them at once. Tensors stand on the GPU."""

    pieces: Sequence[Piece]
    starts: Tensor  # (P + 1,) int32: the first query of each piece, and the end
    longest: int  # queries of the longest piece
    key_starts: Tensor  # (P + 1,) int32: the same of the keys that each piece sees
    longest_keys: int
    keys: Tensor | None  # (S,) where in the row these keys are, piece by piece; None: each piece sees itself alone

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device) -> Ragged:
        starts = [0, *accumulate(piece.length for piece in pieces)]
        seen = [seen_by(pieces, number) for number in range(len(pieces))]
        key_lengths = [sum(pieces[i].length for i in numbers) for numbers in seen]
        shared = any(piece.after is not None for piece in pieces)
        keys = torch.tensor([place for numbers in seen for i in numbers for place in range(starts[i], starts[i + 1])]) if shared else None
        return cls(
            pieces=pieces,
            starts=send(torch.tensor(starts, dtype=torch.int32), device),
            longest=max(piece.length for piece in pieces),
            key_starts=send(torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32), device),
            longest_keys=max(key_lengths),
            keys=None if keys is None else send(keys, device),
        )
