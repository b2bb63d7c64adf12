"""Attention of a packed row in bfloat16 on a CPU: blocks of its pieces' queries, those of similar size side by side in one product.

torch's kernel takes one piece at a time, in products that are slow ones on a processor made for bfloat16: its backward pass takes two to
four times as long. What is laid out here serves every layer of every model that reads the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.models.pieces import Piece, seen_by

BLOCK = 128  # queries at most: what more of them make does not stay in a core's cache, and fewer skip little of what no query sees
SCORES = 2**16  # of one head at most in a batch, but for a block that has more by itself
PADDED = 1.2  # times as many scores as there need be, in batches,
SPARE = 2**13  # or so many more of one head: about what the operations of another batch would cost


@dataclass(frozen=True)
class Batch:
    """P blocks of up to n queries, which see up to m keys. Where one has less, its last one is repeated."""

    queries: Tensor  # (P · n,) places in the row
    keys: Tensor  # (P · m,)
    hidden: Tensor  # (P, 1, n, m) -∞ where a query does not see a key, else 0
    filled: Tensor | None  # (R,) which of P · n are no repetitions; None: all
    runs: Sequence[Sequence[slice]]  # P: where each block's keys stand in the row


@dataclass(frozen=True)
class _Block:
    """Queries that stand side by side in the row, and the keys that the last of them sees."""

    queries: slice
    runs: Sequence[slice]  # of keys, left to right; the last one ends with the queries' piece

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of keys and of queries."""
        return sum(run.stop - run.start for run in self.runs), self.queries.stop - self.queries.start


@dataclass(frozen=True)
class Blocks:
    """The pieces of a row, which are laid out when half precision asks for it: in fp32 torch's kernel is as quick."""

    pieces: Sequence[Piece]

    @cached_property
    def batches(self) -> Sequence[Batch]:
        """All blocks, those of similar size together."""
        batches: list[list[_Block]] = []
        for block in sorted(self._cut(), key=lambda block: block.size):
            if batches and _fit([*batches[-1], block]):
                batches[-1].append(block)
            else:
                batches.append([block])
        return [_batch(batch) for batch in batches]

    @cached_property
    def longest_keys(self) -> int:
        """The most keys that a piece sees."""
        return max(sum(self.pieces[i].length for i in seen_by(self.pieces, number)) for number in range(len(self.pieces)))

    def _cut(self) -> Iterator[_Block]:
        ends = list(accumulate(piece.length for piece in self.pieces))
        for number, piece in enumerate(self.pieces):
            before = [slice(ends[i] - self.pieces[i].length, ends[i]) for i in seen_by(self.pieces, number)[:-1]]
            begin, count = ends[number] - piece.length, -(-piece.length // BLOCK)
            for first, end in pairwise(begin + piece.length * cut // count for cut in range(count + 1)):
                yield _Block(slice(first, end), [*before, slice(begin, end)])


def _fit(batch: Sequence[_Block]) -> bool:
    """Whether blocks may stand side by side."""
    sizes = [block.size for block in batch]
    scores = len(batch) * max(keys for keys, _ in sizes) * max(queries for _, queries in sizes)
    real = sum(keys * queries for keys, queries in sizes)
    return scores <= min(SCORES, max(PADDED * real, real + SPARE))


def _batch(blocks: Sequence[_Block]) -> Batch:
    seen, count = torch.tensor([block.size for block in blocks]).T
    n, m = int(count.max()), int(seen.max())
    own = torch.arange(n).clamp(max=count[:, None] - 1)  # (P, n)
    places = [[place for run in block.runs for place in range(run.start, run.stop)] for block in blocks]
    last = (seen - count)[:, None] + own  # the last key that each query sees
    hidden = torch.zeros(len(blocks), n, m).masked_fill_(torch.arange(m) > last[:, :, None], -math.inf)
    filled = (torch.arange(n) < count[:, None]).flatten().nonzero().squeeze(1)
    return Batch(
        queries=(torch.tensor([block.queries.start for block in blocks])[:, None] + own).flatten(),
        keys=torch.tensor([place for some in places for place in some + some[-1:] * (m - len(some))]),
        hidden=hidden[:, None],
        filled=None if len(filled) == len(blocks) * n else filled,
        runs=[block.runs for block in blocks],
    )


def attend(query: Tensor, key: Tensor, value: Tensor, row: Blocks, scale: float | None) -> Tensor:
    """Query (1, Q, N, D), key and value (1, H, N, D) of a row → (1, N, Q, D). Each of H heads of keys serves Q / H heads of queries.

    Args:
        scale: of the products of queries and keys; None: 1/√D.
    """
    return cast(Tensor, BlockAttention.apply(query, key, value, row, scale if scale is not None else query.shape[-1] ** -0.5))


class BlockAttention(torch.autograd.Function):
    """Scores and chances are fp32, as are the sums within each product; what a product makes of them is rounded once.

    Nothing is kept for the backward pass but what came in: it computes the chances again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Blocks, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.row, ctx.scale = row, scale
        queries, _, values = (_by_token(states) for states in (query, key, value))
        found = values.new_empty(*queries.shape[:2], values.shape[2])
        for batch, _, chances in _chances(query, key, row, scale):
            made = torch.bmm(chances.to(values.dtype), _of_heads(values, batch.keys, batch))
            _put(found, _of_tokens(made, batch, key.shape[1]), batch)
        return found[None]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        heads, slope = key.shape[1], slopes[0][0]
        queries, keys, values = (_by_token(states) for states in (query, key, value))
        of_queries = torch.empty_like(queries)
        of_keys, of_values = (torch.zeros(states.shape, dtype=torch.float32) for states in (keys, values))
        for batch, some, chances in _chances(query, key, ctx.row, ctx.scale):
            pull = _of_heads(slope, batch.queries, batch, heads)
            if batch.filled is not None:
                pull = pull * _kept(batch.filled, batch, pull)
            of_chances = torch.bmm(pull, _of_heads(values, batch.keys, batch).mT).float()
            of_scores = torch._softmax_backward_data(of_chances, chances, -1, torch.float32).mul_(ctx.scale).to(query.dtype)
            _put(of_queries, _of_tokens(torch.bmm(of_scores, _of_heads(keys, batch.keys, batch)), batch, heads), batch)
            _add(of_values, torch.bmm(chances.to(value.dtype).mT, pull), batch)
            _add(of_keys, torch.bmm(of_scores.mT, some), batch)
        of_all = zip((of_queries, of_keys, of_values), (query, key, value), strict=True)
        of_query, of_key, of_value = (slope.to(states.dtype).transpose(0, 1)[None] for slope, states in of_all)
        return of_query, of_key, of_value, None, None


def _chances(query: Tensor, key: Tensor, row: Blocks, scale: float) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Of each batch its queries (P · H, Q / H · n, D) and their chances (P · H, Q / H · n, m), fp32."""
    queries, keys = _by_token(query), _by_token(key)
    shared = query.shape[1] // key.shape[1]
    for batch in row.batches:
        some = _of_heads(queries, batch.queries, batch, key.shape[1])
        count, _, n, m = batch.hidden.shape
        scores = torch.bmm(some.float(), _of_heads(keys, batch.keys, batch).float().mT)
        scores.view(count, -1, n, m).mul_(scale).add_(batch.hidden)
        yield batch, some, torch.softmax(scores.view(-1, shared * n, m), -1)


def _by_token(states: Tensor) -> Tensor:
    """(1, H, N, D) → (N, H, D)."""
    return states[0].transpose(0, 1)


def _of_heads(states: Tensor, places: Tensor, batch: Batch, groups: int | None = None) -> Tensor:
    """Places of (N, H, D), block by block and head by head: (P · groups, H / groups · n, D); groups: H, if not said."""
    _, heads, width = states.shape
    groups = groups or heads
    picked = states.index_select(0, places).view(len(batch.runs), -1, groups, heads // groups, width)
    return picked.permute(0, 2, 3, 1, 4).reshape(len(batch.runs) * groups, -1, width)


def _of_tokens(made: Tensor, batch: Batch, groups: int) -> Tensor:
    """What belongs to a batch's queries, (P · groups, Q / groups · n, D) → (P · n, Q, D)."""
    count, n, width = len(batch.runs), batch.hidden.shape[2], made.shape[-1]
    return made.view(count, groups, -1, n, width).permute(0, 3, 1, 2, 4).reshape(count * n, -1, width)


def _put(into: Tensor, made: Tensor, batch: Batch) -> None:
    """Write rows of a batch's queries to their places."""
    if batch.filled is None:
        into.index_copy_(0, batch.queries, made)
    else:
        into.index_copy_(0, batch.queries[batch.filled], made.index_select(0, batch.filled))


def _add(into: Tensor, made: Tensor, batch: Batch) -> None:
    """Add rows of a batch's keys (P · H, m, D) at their places: block by block, as a key may be seen by several."""
    for block, runs in zip(made.view(len(batch.runs), into.shape[1], -1, into.shape[2]).transpose(1, 2), batch.runs, strict=True):
        first = 0
        for run in runs:
            into[run] += block[first : first + run.stop - run.start]
            first += run.stop - run.start


def _kept(filled: Tensor, batch: Batch, like: Tensor) -> Tensor:
    """1 for a batch's queries, 0 for repetitions: (P · H, Q / H · n, 1)."""
    count, _, n, _ = batch.hidden.shape
    kept = torch.zeros(count * n, dtype=like.dtype).index_fill_(0, filled, 1.0)
    return kept.view(count, 1, 1, n).expand(-1, len(like) // count, like.shape[1] // n, -1).reshape(len(like), -1, 1)
