"""Log-probabilities and entropies of rows of logits, forwards and backwards: each row is read once, and no copy of it in fp32 exists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # that a program works on at a time


def try_out() -> None:
    measure(torch.zeros(1, 2, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda"), 1.0)


def measure(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Of each row: log-probability of the target, logarithm of the sum of exponentials, entropy in nats. (n, V), (n,) → (3, n), fp32."""
    found = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _measure[(len(logits),)](logits, targets.contiguous(), *found, 1 / temperature, logits.stride(0), logits.shape[1], COLUMNS)
    return found


def slopes(
    logits: Tensor,
    targets: Tensor,
    totals: Tensor,
    entropies: Tensor,
    of_log_probs: Tensor,
    of_entropies: Tensor | None,
    temperature: float,
) -> Tensor:
    """Gradient of the logits (n, V), from those of log-probabilities (n,) and entropies (n,), by what `measure` has found."""
    made = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    given = (
        targets.contiguous(),
        totals,
        entropies,
        of_log_probs.contiguous(),
        of_log_probs if of_entropies is None else of_entropies.contiguous(),
    )
    grid = (len(logits), triton.cdiv(logits.shape[1], COLUMNS))
    if len(logits):
        _slopes[grid](logits, *given, made, 1 / temperature, logits.stride(0), logits.shape[1], of_entropies is not None, COLUMNS)
    return made


# mypy: disable-error-code="no-untyped-def"
# the types of what follows are Triton's


@triton.jit
def _measure(logits, targets, log_probs, totals, entropies, factor, stride, columns, SIZE: tl.constexpr):  # noqa: N803
    """Σ w and Σ w·x, with w = exp(x − largest), as columns come, scaled down when a larger logit comes (arXiv 1805.02867)."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for first in range(0, columns, SIZE):
        at = first + tl.arange(0, SIZE)
        x = tl.load(logits + row * stride + at, mask=at < columns, other=float("-inf")).to(tl.float32) * factor
        larger = tl.maximum(largest, tl.max(x, 0))
        below = tl.where(larger == float("-inf"), 0.0, larger)
        shrunk = tl.exp(largest - below)
        weights = tl.exp(x - below)
        total = total * shrunk + tl.sum(weights, 0)
        weighted = weighted * shrunk + tl.sum(tl.where(weights > 0, weights * x, 0.0), 0)
        largest = larger
    all_of_them = largest + tl.log(total)
    chosen = tl.load(logits + row * stride + tl.load(targets + row)).to(tl.float32) * factor
    tl.store(log_probs + row, chosen - all_of_them)
    tl.store(totals + row, all_of_them)
    tl.store(entropies + row, all_of_them - weighted / total)


@triton.jit
def _slopes(
    logits,
    targets,
    totals,
    entropies,
    of_log_probs,
    of_entropies,
    made,
    factor,
    stride,
    columns,
    WITH_ENTROPY: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    x = tl.load(logits + row * stride + at, mask=at < columns, other=float("-inf")).to(tl.float32) * factor
    log_p = x - tl.load(totals + row)
    p = tl.exp(log_p)
    slope = tl.load(of_log_probs + row)
    change = tl.where(at == tl.load(targets + row), slope, 0.0) - slope * p
    if WITH_ENTROPY:
        change -= tl.where(p > 0, p * (log_p + tl.load(entropies + row)) * tl.load(of_entropies + row), 0.0)
    tl.store(made + row * columns + at, (change * factor).to(made.dtype.element_ty), mask=at < columns)
