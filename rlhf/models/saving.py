"""A trained model as an ordinary Hugging Face folder, however its ranks hold it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.engine.partition import whole_weights
from rlhf.job import Job
from rlhf.models.lora import Adapters

SENTENCEPIECE = "tokenizer.model"  # llama.cpp's converter makes a Gemma of it alone


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
    # an answer follows its prompt; but of a reward model some families count positions over what stands before a dialogue
    _save_tokenizer(tokenizer, folder, "left" if model.can_generate() else "right")
    _name_as_before(folder)
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
    _save_tokenizer(tokenizer, folder, "left")
    _name_as_before(folder)
    for name in names:
        shutil.copyfile(source / name, folder / name)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, padding_side: str) -> None:
    """Write a tokenizer, with what transformers leaves out: the padding side, and a file that programs read which are not transformers."""
    tokenizer.save_pretrained(folder)
    more: dict[str, Any] = {"padding_side": padding_side}
    source = Path(tokenizer.name_or_path or folder) / SENTENCEPIECE
    if source.is_file():
        if not (folder / SENTENCEPIECE).exists():
            shutil.copyfile(source, folder / SENTENCEPIECE)
        # tokens that are not in that file have their names from here
        added = tokenizer.added_tokens_decoder.items()
        more["added_tokens_decoder"] = {str(number): {"content": str(token), **_options(token)} for number, token in sorted(added)}
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write(folder / "tokenizer_config.json", config | more)


def _options(token: AddedToken) -> dict[str, bool]:
    return {name: getattr(token, name) for name in ("lstrip", "normalized", "rstrip", "single_word", "special")}


def _name_as_before(folder: Path) -> None:
    """Write what transformers 4 reads beside what 5 writes: it would not find `rope_parameters`, and take other positions without a word.

    So do programs that read config.json by themselves.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    given = config.get("rope_parameters") or {}
    rope = given.get("full_attention", given)  # of layers of several kinds, the others' have names of their own
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        if config["model_type"] == "phi3" and "rope_scaling" in config:  # these alone are taken there
            config["rope_scaling"] = {"type": rope["rope_type"], **{name: rope[name] for name in ("short_factor", "long_factor")}}
        if "sliding_attention" in given:
            config["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config["model_type"] == "gpt_neox":
            config |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
        _write(folder / "config.json", config)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if "extra_special_tokens" in tokenizer:
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        _write(folder / "tokenizer_config.json", tokenizer)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    return GenerationConfig(do_sample=False, **ends)
