"""Folders of given models, as a user has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def model(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The folder of a tied model."""
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def untied(model: Path, llama: LlamaForCausalLM) -> Path:
    """The same model with an output layer of its own, in three files."""
    config = llama.config
    config.tie_word_embeddings = False
    other = AutoModelForCausalLM.from_config(config)
    (model / "model.safetensors").unlink()
    other.save_pretrained(model, max_shard_size="50KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    return model
