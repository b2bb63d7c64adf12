"""A tiny model in a folder, and an engine that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.serving.engine import Engine
from rlhf.serving.writer import Writer


@pytest.fixture
def folder(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    found = Engine(Writer(folder, 8, 128), slots=8, threads=1)
    yield found
    found.close()
