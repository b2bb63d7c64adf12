"""Files of given models that are not what they seem: pointers, parts, other formats, quantised weights, adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.models.given import check
from tests.models.test_given import configure, given, only, rewrite

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    what, remedy = only(model)
    assert f"has git-lfs pointers in the place of files: {name}" in what
    assert "git lfs pull" in remedy


def test_a_link_that_leads_nowhere_is_named(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../../blobs/0123")  # a snapshot of the hub's cache, copied without what it links to
    what, remedy = only(model)
    assert "has links to files that are not there: model.safetensors" in what
    assert "cp -rL" in remedy


def test_a_file_that_is_cut_off_or_no_weights_at_all_is_named(model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for content, said in (
        (whole[:-100], f"has model.safetensors, which is cut off: {len(whole) - 100:,} of {len(whole):,} bytes"),
        (whole[:50], "has model.safetensors, which is cut off at 50 bytes, or no safetensors file"),
        (b"", "has model.safetensors, which is cut off at 0 bytes"),
        (b"<!DOCTYPE html><html>Sign in", "has model.safetensors, which is cut off at 28 bytes, or no safetensors file"),
        (whole + b"more", "has model.safetensors, which is damaged"),
    ):
        path.write_bytes(content)
        what, remedy = only(model)
        assert said in what
        assert "download it again" in remedy


def test_files_of_weights_that_are_absent_are_named(untied: Path) -> None:
    (untied / "model-00002-of-00004.safetensors").unlink()
    what, _ = only(untied)
    assert "lacks files of its weights: model.safetensors.index.json names 4, and model-00002-of-00004.safetensors is not there" in what
    index = untied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    assert "has an index that cannot be read, model.safetensors.index.json: 'metadata'" in only(untied)[0]
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}))
    assert "'../model.safetensors' is no name of a file" in only(untied)[0]
    index.write_text("{")
    assert "has an index that cannot be read, model.safetensors.index.json" in only(untied)[0]
    index.unlink()
    what, remedy = only(untied)
    assert "has neither model.safetensors nor model.safetensors.index.json" in what
    assert "bring the index" in remedy


def test_a_folder_that_is_no_model_says_what_it_holds(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    assert only(folder)[0].endswith("has no config.json: it is empty")
    (folder / "notes.txt").touch()
    assert only(folder)[0].endswith("has no config.json, but notes.txt")
    shutil.copytree(model, folder / "checkpoint-100")
    what, remedy = only(folder)
    assert what.endswith("has no config.json, but folders in it have: checkpoint-100")
    assert remedy.endswith("base.model=…/checkpoint-100")
    for place in (folder, model):  # with a config.json, too
        (place / "model-q4.gguf").write_bytes(b"GGUF")
        (place / "model.safetensors").unlink(missing_ok=True)
        what, remedy = only(place)
        assert what.endswith("has its weights as GGUF (model-q4.gguf), which llama.cpp runs and nobody trains")
        assert "the model that it was made from" in remedy


def test_a_folder_without_a_tokenizer_says_so(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert only(model)[0].endswith("no tokenizer is in its folder")


QUANTISED = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "mxfp4"},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "compressed-tensors", "config_groups": {}},
]


@pytest.mark.parametrize("quantised", QUANTISED, ids=lambda values: values["quant_method"])
def test_quantised_models_are_refused(model: Path, quantised: dict[str, Any]) -> None:
    configure(model, quantization_config=quantised)
    what, remedy = only(model)
    assert f"is quantised ({quantised['quant_method']}), and cannot be trained" in what
    assert "dequantize().save_pretrained" in remedy


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_known_without_their_config(model: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(model / "model.safetensors", lambda weights: weights | {name: weights[name].to(dtype)})
    what, _ = only(model)
    assert f"has quantised weights, which cannot be trained: {name}" in what


def test_an_adapter_is_no_model(model: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    for _ in range(2):
        what, remedy = only(folder)
        assert "is a LoRA adapter (adapter_config.json), which is no model by itself" in what
        assert "merge_and_unload()" in remedy
        shutil.copy(model / "config.json", folder)  # so that it looks like a model
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    assert "has no weights for " in check(given(folder))[0].what
