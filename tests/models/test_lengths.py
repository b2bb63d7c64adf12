"""What depends on the length of a sequence: windows, scaled positions, and where a model ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf.errors import UserError
from rlhf.models.limits import limits
from rlhf.models.packed import pack
from rlhf.models.policy import check_length
from rlhf.models.supported import ROPES
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling
from tests.models.families import EOS, PAD, WINDOWED, eager, near, near_eager, of_each, sequences, tiny


def reads_as_eager(model: PreTrainedModel, longest: int) -> None:
    """Rows and answers up to a length, packed and decoded, and gradients are as transformers computes each alone."""
    begin, *ends = sequences((longest // 2, longest - longest // 2, 1, longest // 4))
    given = [*(begin + end for end in ends), *sequences((longest, 5))]
    packed = pack(given, "cpu")
    side_by_side = of_each(packed, model(**packed.inputs, use_cache=False).logits[0])
    with eager(model):
        alone = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in given]
    for logits, expected in zip(side_by_side, alone, strict=True):
        near(logits, expected)
    found, expected = (torch.autograd.grad(torch.cat(logits).sin().sum(), list(model.parameters())) for logits in (side_by_side, alone))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(gradient.abs().max().item() for gradient in expected))
    prompts = [begin, *sequences((longest - 20, 3))]
    near_eager(model, generate(model, prompts, range(3), Sampling(1.0, 0, 1.0, 20), eos_id=EOS, pad_id=PAD, slots=2))


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("window", [16, 60])
def test_a_sliding_window_is_kept_to_where_sequences_are_longer(family: str, window: int) -> None:
    model = tiny(family, sliding_window=window, **WINDOWED[family])
    check_length(model, 48, "sft.max_tokens")
    reads_as_eager(model, 48)


SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 6.0], "original_max_position_embeddings": 48},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kind", SCALED)
def test_positions_are_scaled_as_transformers_scales_them(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 100.0, **SCALED[kind]}
    model = tiny("llama", max_position_embeddings=64, rope_parameters=rope)
    longest = min(limits(model.config).values())
    assert longest == (48 if kind == "longrope" else 64)
    reads_as_eager(model, longest)
    with pytest.raises(UserError, match=rf"sft\.max_tokens: {longest + 1} tokens .*(number of positions|longrope)"):
        check_length(model, longest + 1, "sft.max_tokens")


def test_every_kind_of_scaling_that_transformers_has_is_known() -> None:
    assert set(SCALED) == ROPES == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize(
    ("family", "given", "name", "limit"),
    [
        ("gemma3", {"text_config": {"max_position_embeddings": 64}}, "number of positions", 64),  # that of the model of texts inside
        ("phimoe", {"sliding_window": 8}, "sliding attention window", 8),  # it has it in its mask alone, and does not say in which layers
        ("llama4_text", {"attention_chunk_size": 32}, "chunks of attention", 32),
    ],
)
def test_what_limits_the_length_of_a_sequence(family: str, given: dict[str, Any], name: str, limit: int) -> None:
    assert limits(AutoConfig.for_model(family, **given))[name] == limit


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(UserError, match=r"ppo\.max_prompt_tokens: 2049 tokens .* number of positions, 2048"):
        check_length(tiny("opt"), 2049, "ppo.max_prompt_tokens")
    check_length(tiny("qwen2"), 5000, "a window of 4096 that no layer uses")
