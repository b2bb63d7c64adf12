"""What a step cost: operations as torch counts them, phases of a clock, and the numbers that are logged of them."""

from __future__ import annotations

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from rlhf.engine.speed import Clock, Products, matrix_rate, peak_memory
from rlhf.models.attention import attend_to_pieces
from rlhf.models.packed import pack
from rlhf.models.policy import logits_at
from rlhf.models.scalar import ScalarModel
from tests.flops import counted

PACKED = pack([[5] * 20, [6] * 9], "cpu")  # 29 tokens
PLACES = torch.tensor([*range(15), 19, 19, 20, 28])  # so many that the last layer is computed whole


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_language_model_are_those_that_torch_counts(llama: LlamaForCausalLM, *, tied: bool) -> None:
    if not tied:
        llama.lm_head.weight = torch.nn.Parameter(llama.lm_head.weight.detach().clone())
    products = Products.of(llama)
    assert products.forward(29, 19) == counted(lambda: logits_at(llama, PACKED, PLACES))
    assert products.training(29, 19) == counted(lambda: logits_at(llama, PACKED, PLACES).sum().backward())


def test_operations_of_a_reward_model_are_those_that_torch_counts(llama: LlamaForCausalLM) -> None:
    llama.config.num_labels = 1
    scalar = ScalarModel(AutoModelForSequenceClassification.from_config(llama.config))
    attend_to_pieces(scalar.model)

    def values() -> Tensor:
        return scalar(**PACKED.inputs)

    products = Products.of(scalar)
    assert products.forward(29) == counted(values)
    assert products.training(29) == counted(lambda: values().sum().backward())


def test_weights_that_are_not_trained_cost_no_gradient_of_their_own(llama: LlamaForCausalLM) -> None:
    get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear"))
    products = Products.of(llama)
    assert products.body_trained == sum(p.numel() for name, p in llama.named_parameters() if "lora_" in name) > 0
    assert products.output_trained == 0
    assert products.training(10, 2) == 2 * products.forward(10, 2) + 2 * products.body_trained * 10


def test_a_clock_adds_up_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 15.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    for phase in ("switching", "generation", "switching"):
        clock.stop(phase)
    assert clock.report({"generation": 60}) == {
        "seconds": 6.0,
        "switching_seconds": 2.0,
        "generation_seconds": 4.0,
        "switching_share": 1 / 3,
        "generation_share": 2 / 3,
        "generation_tokens_per_second": 15.0,
    }


def test_the_rate_is_measured_without_drawing_from_the_runs_generator() -> None:
    before = torch.get_rng_state()
    assert matrix_rate(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


def test_peak_memory_is_the_largest_that_the_process_has_held() -> None:
    held = torch.ones(2**24)
    now = psutil.Process().memory_info().rss / 2**30
    assert now > held.nbytes / 2**30
    assert now - 0.01 < peak_memory(torch.device("cpu")) < 100
