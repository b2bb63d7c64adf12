"""A trained model as an ordinary Hugging Face folder, however its ranks hold it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.engine.partition import whole_weights
from rlhf.job import Job
from rlhf.models.lora import Adapters


def save(job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, adapters: Adapters | None = None) -> None:
    """Have rank 0 write the model, and its adapters beside it; all ranks must call it, and the model is not to be used afterwards."""
    weights = whole_weights(model)
    if not job.is_main:
        return
    if adapters:
        if weights:
            adapters = adapters.holding(weights)
            model, weights = adapters.model, None
        adapters.save_and_merge(folder / "adapter")
    save_model(model, tokenizer, folder, weights)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write an ordinary Hugging Face folder: safetensors, config, tokenizer with chat template, generation config.

    Args:
        weights: the whole weights by name, where the model holds only a part of each.
    """
    model.config.use_cache = True
    if model.can_generate():
        model.generation_config = _generation(tokenizer)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    model.config.use_cache = False


def copy_model(source: Path, names: Iterable[str], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face folder with files of weights as they are: none is held in memory, and none is read twice.

    Args:
        source: the folder of the files.
        names: of the files; a link is followed, as DVC would change what it leads to.
    """
    config.use_cache = True
    config.save_pretrained(folder)
    _generation(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in names:
        shutil.copyfile(source / name, folder / name)


def _generation(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    return GenerationConfig(do_sample=False, **ends)
