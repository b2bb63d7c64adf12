"""Attention in bfloat16 on a CPU, all pieces of a row together, against float64, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.models import blocks
from rlhf.models.blocks import BLOCK, Blocks
from rlhf.models.pieces import Piece, seen_by

WIDTH, VALUES = 16, 24
ROWS = {
    "one token": [Piece(1, None)],
    "one piece": [Piece(7, None)],
    "of one size": [Piece(9, None)] * 5,
    "of many sizes": [Piece(length, None) for length in (3, 40, 9, 41, 38, 1, 90, 10)],
    "longer than a block": [Piece(2 * BLOCK + 3, None), Piece(5, None), Piece(BLOCK, None)],
    "a beginning in common": [Piece(30, None), Piece(5, 0), Piece(BLOCK + 9, 0), Piece(4, 2), Piece(6, 2), Piece(8, None)],
}


def tensors(*shapes: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.randn(1, *shape, generator=generator)).bfloat16().requires_grad_() for shape in shapes]


def attended(given: Sequence[Tensor], pieces: Sequence[Piece], scale: float | None) -> Tensor:
    query, key, value = given
    return blocks.attend(query, key, value, Blocks(pieces), scale)


def exactly(given: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """(1, N, Q, D) in the precision of what is given."""
    query, key, value = given
    lengths = [piece.length for piece in pieces]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    found = []
    for number, piece in enumerate(pieces):
        k, v = (torch.cat([states[i] for i in seen_by(pieces, number)], dim=2) for states in (keys, values))
        mask = torch.ones(piece.length, k.shape[2], dtype=torch.bool).tril(k.shape[2] - piece.length)
        found.append(scaled_dot_product_attention(queries[number], k, v, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2))
    return torch.cat(found, dim=1)


def apart(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest relative distance."""
    return max(float((one.detach().double() - other).norm() / other.norm()) for one, other in zip(found, right, strict=True))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("name", ROWS)
def test_answers_and_gradients_are_as_near_as_one_rounding(name: str, heads: tuple[int, int]) -> None:
    pieces = ROWS[name]
    tokens = sum(piece.length for piece in pieces)
    given = tensors((heads[0], tokens, WIDTH), (heads[1], tokens, WIDTH), (heads[1], tokens, VALUES))
    exact = [states.detach().double().requires_grad_() for states in given]
    right, found = exactly(exact, pieces), attended(given, pieces, 0.3)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert found.dtype == torch.bfloat16
    assert apart([found], [right.detach()]) < 2**-8
    of_found, of_right = torch.autograd.grad(found, given, slope), torch.autograd.grad(right, exact, slope.double())
    if tokens > 1:  # of a single key there is nothing to choose: its score and its query have no gradient
        assert apart(of_found, of_right) < 2**-7


def test_blocks_of_similar_size_stand_together_and_none_gets_lost() -> None:
    pieces = ROWS["of many sizes"]
    batches = Blocks(pieces).batches
    assert len(batches) < len(pieces)
    places = torch.cat([batch.queries if batch.filled is None else batch.queries[batch.filled] for batch in batches])
    assert places.sort().values.tolist() == list(range(sum(piece.length for piece in pieces)))


def test_the_same_bytes_each_time() -> None:
    pieces = ROWS["a beginning in common"]
    tokens = sum(piece.length for piece in pieces)
    given = tensors((4, tokens, WIDTH), (2, tokens, WIDTH), (2, tokens, VALUES))
    runs = []
    for _ in range(3):
        found = attended(given, pieces, None)
        runs.append([found, *torch.autograd.grad(found.float().square().sum(), given)])
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))
