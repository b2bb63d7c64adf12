"""The last layer, which multiplies only for the tokens of which something is read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.models.attention import attend_to_pieces
from rlhf.models.last_layer import LastLayer
from rlhf.models.packed import pack
from rlhf.models.policy import logits_at
from tests.flops import counted
from tests.models.families import near, sequences, tiny

PACKED = pack([[5] * 20, [6, 7] * 5], "cpu")  # 30 tokens
FEW = torch.tensor([3, 19, 19, 20, 29])
WEIGHTS = torch.linspace(-1, 1, len(FEW))[:, None]


def products(llama: LlamaForCausalLM, places: Tensor) -> float:
    """Multiplications with the weights of the layers, for the logits of some places."""
    return counted(lambda: logits_at(llama, PACKED, places)) / 2 - len(places) * llama.lm_head.weight.numel()


def gradients(model: torch.nn.Module, *, whole: bool = False) -> dict[str, Tensor]:
    """Of a sum over the logits at FEW; whole: with nothing left out."""
    logits = model(**PACKED.inputs, use_cache=False).logits[0, FEW] if whole else logits_at(model, PACKED, FEW)
    model.zero_grad()
    (logits * WEIGHTS).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_of_the_last_layer_only_keys_queries_and_values_are_made_for_all_tokens(llama: LlamaForCausalLM) -> None:
    last = llama.model.layers[-1]
    layer = sum(parameter.numel() for parameter in last.parameters() if parameter.ndim == 2)
    after = sum(part.weight.numel() for part in (last.self_attn.o_proj, last.mlp.gate_proj, last.mlp.up_proj, last.mlp.down_proj))
    assert products(llama, FEW) == 2 * 30 * layer - (30 - 4) * after
    assert products(llama, torch.arange(15)) == 2 * 30 * layer - 15 * after
    assert products(llama, torch.arange(16)) == 2 * 30 * layer  # more than half of the row: to pick them out would not pay


@pytest.mark.parametrize("how", ["plain", "activations computed again", "adapters", "copied"])
def test_gradients_are_those_of_the_whole_row(llama: LlamaForCausalLM, how: str) -> None:
    model: torch.nn.Module = llama
    if how == "activations computed again":
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        llama.train()
    if how == "adapters":
        model = get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if how == "copied":
        model = copy.deepcopy(llama)
    expected = gradients(model, whole=True)
    found = gradients(model)
    assert expected.keys() == found.keys()
    assert len(expected) == (len(list(llama.parameters())) if how != "adapters" else 2 * 2 * 7)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)


def test_a_layer_that_attends_again_is_refused(llama: LlamaForCausalLM) -> None:
    last = LastLayer(llama)
    last.attended(None, 30)
    last.attended(FEW, 30)
    with pytest.raises(UserError, match="attends twice"):
        last.attended(FEW, 30)


def test_experts_that_are_given_some_of_the_tokens_are_left_out_of_the_last_layers_saving() -> None:
    """Theirs are rows of their own: none of them stands where a token of the row does."""
    model = tiny("llama")
    layer: Any = cast(Any, model).model.layers[-1]
    layer.mlp = Routed([layer.mlp, copy.deepcopy(layer.mlp)])
    attend_to_pieces(model)
    given = sequences()
    packed = pack(given, "cpu")
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in given])
        near(logits_at(model, packed, packed.last), expected)


class Routed(torch.nn.Module):
    """Experts as a list of layers, as older code has them: odd tokens go to one of them."""

    def __init__(self, experts: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(experts)

    def forward(self, hidden: Tensor) -> Tensor:
        odd = hidden.sum(-1) > 0
        made = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            made[odd == bool(number)] = expert(hidden[odd == bool(number)])
        return made
