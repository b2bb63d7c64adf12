"""Models that would be computed otherwise than transformers computes them are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.config.training import PretrainedBase
from rlhf.errors import UserError
from rlhf.models.attention import attend
from rlhf.models.given import pin
from rlhf.models.pieces import Piece
from rlhf.models.policy import load_policy
from rlhf.models.scalar import load_scalar
from rlhf.models.supported import unsupported
from tests.models.families import FAMILIES, SPECIAL, VOCABULARY

MIXED = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptj", {"n_layer": 2}, "an attention of its own"),
    ("bloom", {}, "an attention of its own"),
    ("mpt", {}, "an attention of its own"),
    ("stablelm", {"num_hidden_layers": 2}, "does not hand on to its attention"),
    ("bert", {"num_hidden_layers": 2}, r"tokens after a query \(is_causal=False\)"),
    ("inkling_text", {}, "position_bias"),
    ("doge", {"num_hidden_layers": 2}, "cannot take packed rows"),
    ("diffllama", {"num_hidden_layers": 2}, "attends twice"),
    ("bart", {}, "counts positions by itself"),
    ("mamba", {"num_hidden_layers": 2}, "counts positions by itself"),
    (
        "qwen3_next",
        {**MIXED, "layer_types": ["linear_attention", "full_attention"]},
        "from one sequence to the next: 1 of its 2 layers attend",
    ),
    ("lfm2", {**MIXED, "layer_types": ["conv", "full_attention"]}, "from one sequence to the next: 1 of its 2 layers attend"),
    ("falcon_h1", {"num_hidden_layers": 2}, "from one sequence to the next: its layers have convolutions"),
    ("llama4_text", {"num_hidden_layers": 2}, "attn_temperature_tuning"),
    ("phimoe", {"num_hidden_layers": 2}, "draws at random while it trains"),
    ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "rope_type spiral"),
]


@pytest.mark.parametrize(("family", "sizes", "why"), REFUSED)
def test_a_family_that_would_be_computed_otherwise_is_refused_by_its_configuration(family: str, sizes: dict[str, Any], why: str) -> None:
    found = unsupported(AutoConfig.for_model(family, **sizes))
    assert found is not None
    assert re.search(why, found)
    assert family in found or "this model" in found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_that_is_tested_is_refused(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **FAMILIES[family], **SPECIAL)
    before = config.to_dict()
    assert unsupported(config) is None
    assert config.to_dict() == before


def test_stage_base_refuses_such_a_model_before_it_reads_its_weights(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    AutoConfig.for_model("gptj", n_layer=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = PretrainedBase.model_construct(model=str(tmp_path), revision=None, trust_remote_code=False, chat_template="keep")
    with pytest.raises(UserError, match=r"a model of type gptj has an attention of its own,.* another family"):
        pin(given, tmp_path / "base")


@pytest.mark.parametrize("form", ["causal", "scalar"])
def test_a_loaded_model_that_cannot_take_packed_rows_is_refused(form: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = AutoConfig.for_model("mpt", vocab_size=50, d_model=16, n_layers=1, n_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type mpt has an attention of its own"):
        load_policy(tmp_path, "fp32") if form == "causal" else load_scalar(tmp_path, tokenizer, "fp32")


def test_what_a_layer_asks_for_and_nobody_knows_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 4)
    asked: dict[str, Any]
    for asked in ({"position_bias": torch.zeros(1)}, {"dropout": 0.1}, {"is_causal": False}, {"block_indices": [1]}):
        with pytest.raises(UserError, match=f"Identity asks of its attention what is not applied here: .*{next(iter(asked))}"):
            attend(torch.nn.Identity(), states, states, states, torch.empty(1, 1, 0, 0), [Piece(3, None)], **asked)
    with pytest.raises(UserError, match="a mask of its own"):
        attend(torch.nn.Identity(), states, states, states, torch.zeros(1, 1, 3, 3), [Piece(3, None)])
