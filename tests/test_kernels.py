"""Kernels of a GPU against torch in double precision: on a GPU, or on a processor by Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/test_kernels.py      without a GPU, where Triton is installed (with numpy below 2.3)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rlhf.rollout.sampling import Sampling, sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="there is no GPU, and TRITON_INTERPRET is not 1")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]


def kernels(name: str) -> Any:
    return import_module(f"rlhf.kernels.{name}")


# ------------------------------------------------------------------------------------------------------------------- layers


def by_torch(name: str, given: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers' Llama has in the place of a kernel."""
    if name == "Norm":
        states, weight = given
        return weight * states * (states.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return apply_rotary_pos_emb(*given) if name == "Rotation" else torch.nn.functional.silu(given[0]) * given[1]


def states_for(name: str, width: int, heads: int) -> list[Tensor]:
    """What a kernel is given; of angles there is one for both halves of a head, and gates lie in one row with what they let through."""
    torch.manual_seed(1)
    if name == "Norm":
        return [torch.randn(2, 19, width), torch.rand(width) + 0.5]
    if name == "Gate":
        return list(torch.randn(2, 19, 2 * width).split(width, -1))
    angles = torch.randn(1 if heads == 9 else 2, 19, width // 2).repeat(1, 1, 2)  # the same positions in all rows, or each its own
    return [torch.randn(2, 19, count, width).transpose(1, 2) for count in (heads, 3)] + [angles.cos(), angles.sin()]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("width", "heads"), [(8, 3), (72, 9), (2048, 6)])
@pytest.mark.parametrize("name", ["Norm", "Rotation", "Gate"])
def test_layers_forwards_and_backwards(name: str, width: int, heads: int, dtype: torch.dtype, tolerance: float) -> None:
    known = getattr(kernels("layers"), name)
    found: list[list[Tensor]] = []
    for kind, device in ((torch.float64, torch.device("cpu")), (dtype, DEVICE), (dtype, DEVICE)):
        given = [states.to(dtype).to(device, kind) for states in states_for(name, width, heads)]
        learning = [states.detach().requires_grad_() for states in given[:2]]
        given[:2] = learning
        made = by_torch(name, given) if kind == torch.float64 else known.apply(*given, *([1e-5] if name == "Norm" else []))
        made = made if isinstance(made, tuple) else (made,)
        slopes = [torch.linspace(-1, 2, part.numel()).view(part.shape).to(dtype).to(part) for part in made]
        found.append([part.detach().cpu() for part in (*made, *torch.autograd.grad(made, learning, slopes))])
    for expected, one, again in zip(*found, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, again)
        torch.testing.assert_close(one.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_a_norm_of_what_does_not_lie_densely() -> None:
    norm = kernels("layers").Norm
    wide, weight = torch.randn(5, 2 * 16, device=DEVICE), torch.rand(16, device=DEVICE)
    part = wide[:, :16].requires_grad_()
    made = norm.apply(part, weight, 1e-5)
    torch.testing.assert_close(made, norm.apply(part.detach().clone(), weight, 1e-5))
    (found,) = torch.autograd.grad(made.sum(), part)  # whose gradient is one number, seen everywhere
    (expected,) = torch.autograd.grad(by_torch("Norm", [part, weight]).sum(), part)  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------- logits


def log_probs_and_entropies(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p.nan_to_num(neginf=0)).sum(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS[:2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("columns", [2, 400, 50272])
@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_and_entropies(columns: int, temperature: float, dtype: torch.dtype, tolerance: float, entropy: bool) -> None:
    torch.manual_seed(1)
    logits, targets, slopes = (4 * torch.randn(9, columns)).to(dtype), torch.randint(columns, (9,)), torch.randn(2, 9)
    logits[0, 1], targets[0] = float("-inf"), 0
    exact = logits.double().requires_grad_()
    made = log_probs_and_entropies(exact, targets, temperature)
    sum((part * slope).sum() for part, slope in zip(made[: 1 + entropy], slopes, strict=False)).backward()
    known = kernels("logits")
    rows, wanted, pulls = logits.to(DEVICE), targets.to(DEVICE), slopes.to(DEVICE)
    log_probs, totals, entropies = known.measure(rows, wanted, temperature)
    found = known.slopes(rows, wanted, totals, entropies, pulls[0], pulls[1] if entropy else None, temperature)
    for one, expected in ((log_probs, made[0]), (entropies, made[1])):
        torch.testing.assert_close(one.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(found.double().cpu(), exact.grad.nan_to_num(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [2, 400, 4096, 50272])
def test_a_draw(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits, uniforms = (4 * torch.randn(16, columns)).to(dtype), torch.rand(16)
    logits[0, 1:] = float("-inf")
    uniforms[1], uniforms[2] = 0, 1 - 2**-24
    tokens, log_probs = (made.cpu() for made in kernels("drawing").draw(logits.to(DEVICE), uniforms.to(DEVICE), 0.7))
    expected, of_them = sample(logits, uniforms, Sampling(0.7, 0, 1.0, 1))
    same = tokens == expected
    assert same.sum() >= 15  # one may lie within rounding of the next
    torch.testing.assert_close(log_probs[same], of_them[same], rtol=0, atol=1e-5)


def test_a_draw_from_rows_that_do_not_lie_densely_or_have_no_probabilities() -> None:
    torch.manual_seed(1)
    logits, uniforms = 4 * torch.randn(4, 5000), torch.rand(4)
    draw = kernels("drawing").draw
    expected = draw(logits.to(DEVICE), uniforms.to(DEVICE), 1.0)
    for one, other in zip(expected, draw(logits.to(DEVICE).T.contiguous().T, uniforms.to(DEVICE), 1.0), strict=True):
        assert torch.equal(one, other)
    logits[0, 4999], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    tokens, log_probs = draw(logits.to(DEVICE), uniforms.to(DEVICE), 1.0)
    assert tokens.max() < 5000
    assert log_probs.isnan().tolist() == [True, True, True, False]
    assert log_probs[3] == expected[1][3]
