"""Products of linear layers in fp32 on a CPU, forwards and backwards, by oneDNN.

torch makes them by MKL, which computes on an AMD processor as on one of ten years ago: at 0.45 of the rate that oneDNN comes to there
(bench/speed/products.py). In half precision torch takes oneDNN by itself.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

STEP = 64  # rows: oneDNN makes a program for each number of them, and keeps it


def by_onednn(model: nn.Module) -> None:
    """Have a model's linear layers multiply so. Layers of other classes stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class Linear(nn.Linear):
    """A linear layer as it was, but for what multiplies."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows (…, in) → (…, out)."""
        if not _suits(input, self.weight):
            return super().forward(input)
        rows = filled_up(input)
        made = Product.apply(rows, self.weight, self.bias) if torch.is_grad_enabled() else multiply(rows, self.weight, self.bias)
        return cut(cast(Tensor, made), input.shape)


class Product(torch.autograd.Function):
    """x·Wᵀ + b of rows x (n, in), W (out, in), b (out,) or None, and its gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            multiply(slopes[0], weight.t()) if of_rows else None,
            multiply(slopes[0].t(), rows.t()) if of_weight else None,
            slopes[0].sum(0) if of_bias else None,
        )


def filled_up(rows: Tensor) -> Tensor:
    """(…, D) → (n, D), with zeros up to a multiple of STEP; fewer than that are as they are."""
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % STEP)) if len(flat) > STEP else flat


def cut(made: Tensor, shape: torch.Size) -> Tensor:
    """The rows (n, out) that belong to rows of a shape (…, in), in that shape."""
    return made[: math.prod(shape[:-1])].view(*shape[:-1], made.shape[-1])


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b; no operation is fused into it."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _suits(rows: Tensor, weight: Tensor) -> bool:
    return (
        rows.dtype == weight.dtype == torch.float32
        and rows.device.type == "cpu"
        and rows.numel() > 0
        and torch.backends.mkldnn.is_available()
    )
