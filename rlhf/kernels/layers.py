"""Norms, rotary embeddings and gates, forwards and backwards.

Left to torch each of them is five to ten short operations, every one of which reads and writes all of a layer's states. All arithmetic is
fp32, and what comes out is rounded once. No sum depends on which program is done first: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # that a program works on at a time, at least
SHARES = 512  # programs that the gradient of a norm's weight is cut into, at most


def try_out() -> None:
    Norm.apply(torch.ones(1, 16, device="cuda"), torch.ones(16, device="cuda"), 1e-6)


class Norm(torch.autograd.Function):
    """w · x / √(mean x² + ε) over the last dimension of x (…, D), w (D,) (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows = states.reshape(-1, states.shape[-1]).contiguous()
        made = torch.empty_like(rows)
        scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        count, size = _block(rows)
        _norm[(triton.cdiv(len(rows), count),)](rows, weight, made, scales, len(rows), epsilon, rows.shape[1], size, count)
        ctx.save_for_backward(rows, weight, scales)
        return made.view(states.shape)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weight, scales = ctx.saved_tensors
        pulls = slopes[0].reshape(rows.shape).contiguous()
        made = torch.empty_like(rows)
        count, size = _block(rows)
        shares = min(SHARES, triton.cdiv(len(rows), count))
        of_weight = torch.empty(shares, rows.shape[1], dtype=torch.float32, device=rows.device)
        _norm_back[(shares,)](rows, weight, scales, pulls, made, of_weight, len(rows), rows.shape[1], size, count)
        for_weight = of_weight.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return made.view(slopes[0].shape), for_weight, None


class Rotation(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864) of queries (B, Q, N, D) and keys (B, H, N, D) by cos and sin (B or 1, N, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(query, key, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_turned(slopes[0], slopes[1], *ctx.saved_tensors, back=True), None, None


class Gate(torch.autograd.Function):
    """silu(g) · x, element by element (arXiv 2002.05202); g and x (…, D)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, states: Tensor) -> Tensor:
        gates, rows = _rows_of(gate), _rows_of(states)
        made = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _gate[_grid(rows)](gates, rows, made, gates.stride(0), rows.stride(0), rows.shape[1], ELEMENTS)
        ctx.save_for_backward(gates, rows)
        return made.view(states.shape)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        gates, rows = ctx.saved_tensors
        pulls = slopes[0].reshape(rows.shape).contiguous()
        of_gates, of_rows = torch.empty_like(pulls), torch.empty_like(pulls)
        strides = (gates.stride(0), rows.stride(0))
        _gate_back[_grid(rows)](gates, rows, pulls, of_gates, of_rows, *strides, rows.shape[1], ELEMENTS)
        return of_gates.view(slopes[0].shape), of_rows.view(slopes[0].shape)


def _rows_of(states: Tensor) -> Tensor:
    """(…, D) → (n, D), in its own place where rows lie at one distance from each other."""
    return _with_dense_rows(states.flatten(0, -2))


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], ELEMENTS)


def _block(rows: Tensor) -> tuple[int, int]:
    """Rows that a program takes at a time, and the columns that it has room for."""
    size = triton.next_power_of_2(rows.shape[1])
    return max(1, ELEMENTS // size), size


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """By the angles, or back by them, as gradients are. Token by token in memory, as kernels of attention read them."""
    batch, _, tokens, width = query.shape
    made = [states.new_empty(batch, tokens, states.shape[1], width).transpose(1, 2) for states in (query, key)]
    strides = [stride for states in (query, key) for stride in _with_dense_rows(states).stride()[:3]]
    heads, sharing = query.shape[1], key.shape[1]
    _turn[(batch * tokens,)](
        _with_dense_rows(query),
        _with_dense_rows(key),
        cos.expand(batch, tokens, width).contiguous(),
        sin.expand(batch, tokens, width).contiguous(),
        *made,
        tokens,
        *strides,
        HEADS=heads,
        HEADS_2=triton.next_power_of_2(heads),
        SHARING=sharing,
        SHARING_2=triton.next_power_of_2(sharing),
        HALF=width // 2,
        HALF_2=triton.next_power_of_2(width // 2),
        BACK=back,
    )
    return made[0], made[1]


def _with_dense_rows(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


# mypy: disable-error-code="no-untyped-def"
# the types of what follows are Triton's


@triton.jit(do_not_specialize=["count"])
def _norm(rows, weight, made, scales, count, epsilon, WIDTH: tl.constexpr, WIDTH_2: tl.constexpr, ROWS: tl.constexpr):  # noqa: N803
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH_2)
    inside = (row < count)[:, None] & (at < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + at[None, :]
    x = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + epsilon)
    tl.store(scales + row, scale, mask=row < count)
    tl.store(made + place, (x * scale[:, None] * w[None, :]).to(made.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _norm_back(rows, weight, scales, pulls, made, of_weight, count, WIDTH: tl.constexpr, WIDTH_2: tl.constexpr, ROWS: tl.constexpr):  # noqa: N803
    """With n = x · scale: dx = scale · (w·dy − n · mean(w·dy·n)), dw = Σ dy·n, of which each program adds up its own share."""
    at = tl.arange(0, WIDTH_2)
    w = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    share = tl.zeros((WIDTH_2,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (at < WIDTH)[None, :]
        place = row.to(tl.int64)[:, None] * WIDTH + at[None, :]
        x = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(pulls + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=row < count, other=0.0)
        n = x * scale[:, None]
        pull = dy * w[None, :]
        along = tl.sum(pull * n, 1) / WIDTH
        tl.store(made + place, ((pull - n * along[:, None]) * scale[:, None]).to(made.dtype.element_ty), mask=inside)
        share += tl.sum(dy * n, 0)
    tl.store(of_weight + tl.program_id(0) * WIDTH + at, share, mask=at < WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def _turn(
    query,
    key,
    cos,
    sin,
    of_query,
    of_key,
    tokens,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    SHARING: tl.constexpr,  # noqa: N803
    SHARING_2: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    HALF_2: tl.constexpr,  # noqa: N803
    BACK: tl.constexpr,  # noqa: N803
):
    """Of one token: y₁ = x₁·cos₁ − x₂·sin₁, y₂ = x₂·cos₂ + x₁·sin₂, and with gradients the transposed of it."""
    number, at = tl.program_id(0).to(tl.int64), tl.arange(0, HALF_2)
    row, token = number // tokens, number % tokens
    angle = number * 2 * HALF + at
    c1 = tl.load(cos + angle, mask=at < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + HALF, mask=at < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=at < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + HALF, mask=at < HALF, other=0.0).to(tl.float32)
    first, second = (s2, -s1) if BACK else (-s1, s2)
    source = query + row * query_row + token * query_token
    _turn_heads(source, of_query + number * HEADS * 2 * HALF, query_head, c1, c2, first, second, HEADS, HEADS_2, HALF, HALF_2)
    source = key + row * key_row + token * key_token
    _turn_heads(source, of_key + number * SHARING * 2 * HALF, key_head, c1, c2, first, second, SHARING, SHARING_2, HALF, HALF_2)


@triton.jit
def _turn_heads(
    source,
    target,
    stride,
    c1,
    c2,
    first,
    second,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    HALF_2: tl.constexpr,  # noqa: N803
):
    head, at = tl.arange(0, HEADS_2), tl.arange(0, HALF_2)
    inside = (head < HEADS)[:, None] & (at < HALF)[None, :]
    place = head[:, None] * stride + at[None, :]
    x1 = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + place + HALF, mask=inside, other=0.0).to(tl.float32)
    y1 = x1 * c1[None, :] + x2 * first[None, :]
    y2 = x2 * c2[None, :] + x1 * second[None, :]
    to = head[:, None] * 2 * HALF + at[None, :]
    tl.store(target + to, y1.to(target.dtype.element_ty), mask=inside)
    tl.store(target + to + HALF, y2.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate, states, made, gate_row, state_row, WIDTH: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    g = tl.load(gate + row * gate_row + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    x = tl.load(states + row * state_row + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    tl.store(made + row * WIDTH + at, (g * tl.sigmoid(g) * x).to(made.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _gate_back(gate, states, pulls, of_gate, of_states, gate_row, state_row, WIDTH: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    g = tl.load(gate + row * gate_row + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    x = tl.load(states + row * state_row + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    dy = tl.load(pulls + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    open = tl.sigmoid(g)
    tl.store(of_gate + row * WIDTH + at, (dy * x * open * (1 + g * (1 - open))).to(of_gate.dtype.element_ty), mask=at < WIDTH)
    tl.store(of_states + row * WIDTH + at, (dy * g * open).to(of_states.dtype.element_ty), mask=at < WIDTH)
