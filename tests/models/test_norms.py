"""Norms with few passes: what transformers' own give, forwards and backwards."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhf.models.norms import RMSNorm, with_few_passes

WIDTH = 48
SHAPES = [(1, 7, WIDTH), (1, 5, 3, WIDTH), (4, WIDTH), (1, 1, WIDTH)]


def both(kind: type, precision: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A norm with random weights, and the same with few passes."""
    known = kind(WIDTH, eps=1e-5)
    nn.init.uniform_(known.weight, 0.5, 1.5)
    known = known.to(precision)
    ours = copy.deepcopy(known)
    with_few_passes(ours)
    return known, ours


def made(norm: nn.Module, states: Tensor) -> list[Tensor]:
    """Output and gradients."""
    given = states.clone().requires_grad_()
    found = norm(given)
    found.backward(torch.linspace(-1, 2, found.numel()).view_as(found).to(found.dtype))
    assert torch.equal(given, states)  # nothing is done in its place
    return [found.detach(), *(part.grad for part in (given, *norm.parameters()) if part.grad is not None)]


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, MixtralRMSNorm])
def test_output_and_gradients_are_those_of_transformers(
    kind: type, shape: tuple[int, ...], precision: torch.dtype, tolerance: float
) -> None:
    known, ours = both(kind, precision)
    assert type(ours) is RMSNorm
    states = 3 * torch.randn(shape, dtype=precision)
    assert torch.equal(ours(states), known(states))
    for found, expected in zip(made(ours, states), made(known, states), strict=True):
        assert found.dtype == precision
        assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, Olmo2RMSNorm, nn.LayerNorm])
def test_a_norm_that_is_another_stays_as_it_is(kind: type) -> None:
    known, ours = both(kind, torch.float32)
    assert type(ours) is type(known) is kind


def test_what_is_frozen_gets_no_gradient() -> None:
    _, ours = both(LlamaRMSNorm, torch.float32)
    ours.weight.requires_grad_(False)
    assert len(made(ours, torch.randn(3, WIDTH))) == 2
    ours.weight.requires_grad_(True)
    ours(torch.randn(3, WIDTH)).sum().backward()
    assert ours.weight.grad is not None


def test_gradients_agree_with_differences_of_the_output() -> None:
    _, ours = both(LlamaRMSNorm, torch.float32)
    states, toward = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    (slope,) = torch.autograd.grad(ours(given := states.clone().requires_grad_()).pow(2).sum() / 2, given)
    ends = [ours(states + step * toward).double().pow(2).sum() / 2 for step in (-1e-2, 1e-2)]
    (difference,) = [(after - before) / 2e-2 for before, after in pairwise(ends)]
    assert_close((slope * toward).sum().double(), difference, rtol=1e-2, atol=1e-3)


def test_a_loaded_models_norms_are_such(llama: LlamaForCausalLM) -> None:
    assert {type(module) for name, module in llama.named_modules() if name.endswith("norm")} == {RMSNorm}
