"""Linear layers that multiply by oneDNN: what torch's own layers give, forwards and backwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from rlhf.models.linear import STEP, Linear, by_onednn
from tests.flops import BY_ONEDNN

ROWS = {
    "a row": torch.randn(48),
    "rows": torch.randn(5, 48),
    "a packed row": torch.randn(1, 7, 48),
    "a long one": torch.randn(1, 2 * STEP + 5, 48),
    "transposed": torch.randn(48, 9).t(),
    "repeated": torch.randn(1, 1, 48).expand(2, 3, 48),
    "none": torch.randn(0, 48),
}


def made(layer: nn.Linear, rows: Tensor) -> list[Tensor]:
    """Output and gradients, the output's own being expanded from one number, as a sum's is."""
    given = rows.detach().requires_grad_()
    found = layer(given)
    found.sum().backward()
    return [found.detach(), *(part.grad for part in (given, *layer.parameters()) if part.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_output_and_gradients_are_those_of_a_layer_of_torch(name: str, *, bias: bool) -> None:
    layer = nn.Linear(48, 32, bias=bias)
    ours = copy.deepcopy(layer)
    by_onednn(ours)
    for found, known in zip(made(ours, ROWS[name]), made(layer, ROWS[name]), strict=True):
        assert_close(found, known)


def test_a_frozen_weight_gets_no_gradient_and_a_leaf_none_that_it_does_not_want() -> None:
    layer = nn.Linear(48, 32)
    by_onednn(layer)
    layer.weight.requires_grad_(False)
    layer(ROWS["rows"]).sum().backward()
    assert layer.weight.grad is None
    assert_close(layer.bias.grad, torch.full((32,), 5.0))


def test_a_loaded_models_layers_multiply_so_in_fp32_and_as_before_in_half_precision(llama: LlamaForCausalLM) -> None:
    assert {type(layer) for layer in llama.modules() if isinstance(layer, nn.Linear)} == {Linear}
    ids = torch.tensor([[5, 6, 7]])
    for model, expected in ((llama, True), (copy.deepcopy(llama).bfloat16(), False)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watch:
            model(ids, use_cache=False)
        assert (BY_ONEDNN._qualified_op_name in {event.key for event in watch.key_averages()}) == expected
