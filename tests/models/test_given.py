"""Models as people have them: each that would train on noise, or die late, is refused with its remedy before anything is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.config.training import PretrainedBase
from rlhf.models.given import check, pin
from rlhf.models.policy import load_policy
from rlhf.models.tokenizer import load_tokenizer

ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
ASKED = [{"role": "user", "content": "Hi"}]
Weights = dict[str, torch.Tensor]


def given(folder: Path, **changes: Any) -> PretrainedBase:
    values = {"source": "pretrained", "model": str(folder), "revision": None, "trust_remote_code": False, "chat_template": "keep"}
    return PretrainedBase.model_validate(values | changes)


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


def rewrite(path: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def only(folder: Path, **changes: Any) -> tuple[str, str]:
    """The one thing that is wrong, and its remedy."""
    (error,) = check(given(folder, **changes))
    assert error.what.startswith(f"base.model '{folder}'")
    return error.what, error.remedy


def test_a_whole_model_has_nothing_wrong_with_it(model: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    assert check(given(model)) == []
    assert pin(given(model), tmp_path / "to") == []
    kept = load_policy(tmp_path / "to", "fp32")
    assert all(torch.equal(weight, kept.state_dict()[name]) for name, weight in llama.state_dict().items())


def test_it_is_pinned_with_what_later_stages_need(model: Path, tmp_path: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|user|>{% endfor %}")
    pin(given(model), tmp_path / "kept")
    kept, config = load_tokenizer(tmp_path / "kept"), AutoConfig.from_pretrained(tmp_path / "kept")
    # this template ends a turn with another token than the end of text
    assert kept.eos_token == kept.pad_token == "<|user|>"
    assert (config.eos_token_id, config.pad_token_id) == (kept.eos_token_id, kept.pad_token_id)
    assert GenerationConfig.from_pretrained(tmp_path / "kept").eos_token_id == kept.eos_token_id
    pin(given(model, chat_template="turns"), tmp_path / "turns")
    plain = load_tokenizer(tmp_path / "turns")
    assert plain.eos_token == "<|end|>"
    assert plain.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) == "Human: Hi\n\nAssistant:"


def test_files_of_weights_are_pinned_as_they_are(untied: Path, tmp_path: Path) -> None:
    for path in untied.glob("model-*.safetensors"):
        rewrite(path, lambda weights: {name: weight.bfloat16() for name, weight in weights.items()})
    configure(untied, dtype="bfloat16")
    (untied / "consolidated.safetensors").write_bytes(b"the same in another layout, which nothing reads")
    pin(given(untied), tmp_path / "one")
    pin(given(untied), tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [name for name in names if "safetensors" in name] == sorted(path.name for path in untied.glob("model*safetensors*"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert "safetensors" not in name or (tmp_path / "one" / name).read_bytes() == (untied / name).read_bytes()
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (untied, tmp_path / "one"))
    assert after.dtype == torch.bfloat16
    assert all(torch.equal(weight, after.state_dict()[name]) for name, weight in before.state_dict().items())


MANY = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_neox": {},
    "mistral": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8},
    "phi3": {},
    "mixtral": MANY,
    "qwen3_moe": MANY,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_each_family_are_known_as_whole(model: Path, tmp_path: Path, family: str) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else SIZES | FAMILIES[family]
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=400, **sizes, **ENDS))
    (model / "model.safetensors").unlink()
    made.save_pretrained(model, max_shard_size="30KB")
    pin(given(model), tmp_path / "to")
    kept = load_policy(tmp_path / "to", "fp32").state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in made.state_dict().items())


@pytest.mark.parametrize(
    ("family", "said"),
    [("gptj", "attention of its own, which cannot take packed rows"), ("granite", "of which no reward model can be made")],
)
def test_families_that_cannot_be_trained_are_refused(model: Path, family: str, said: str) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=400, **SIZES, **ENDS)).save_pretrained(model)
    what, remedy = only(model)
    assert f"of type {family}" in what
    assert said in what
    assert "another family" in remedy


# ------------------------------------------------------------------------------------------------ weights that would be random


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new, 1): weight for name, weight in weights.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module._orig_mod."])
def test_a_wrapper_s_prefix_is_named(model: Path, prefix: str) -> None:
    rewrite(model / "model.safetensors", lambda weights: {prefix + name: weight for name, weight in weights.items()})
    what, remedy = only(model)
    assert f"stands '{prefix}'" in what
    assert "save_file({name.replace(PREFIX, '')" in remedy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("layers.1."), "has no weights for model.layers.1.input_layernorm.weight, "),
        (without("embed_tokens"), "has no weights for lm_head.weight, model.embed_tokens.weight, which would be random"),
        (renamed("layers.0.mlp.up_proj", "layers.0.mlp.w3"), "has no weights for model.layers.0.mlp.up_proj.weight, which would be random"),
        (renamed("layers.1.", "layers.1._orig_mod."), "has no weights for model.layers.1.input_layernorm.weight, "),
    ],
)
def test_missing_weights_are_named(model: Path, change: Callable[[Weights], Weights], said: str) -> None:
    rewrite(model / "model.safetensors", change)
    errors = check(given(model))
    assert said in errors[0].what
    assert "a whole model" in errors[0].remedy


def test_an_untied_model_without_output_layer_is_named(untied: Path) -> None:
    for path in untied.glob("model-*.safetensors"):
        rewrite(path, without("lm_head"))
    what, remedy = only(untied)
    assert "has no weights for lm_head.weight, which would be random" in what
    assert "tie_word_embeddings: true" in remedy


def test_spare_weights_are_named(model: Path) -> None:
    rewrite(
        model / "model.safetensors", lambda weights: weights | {"score.weight": torch.ones(1, 32), "model.layers.0.bias": torch.ones(3)}
    )
    what, _ = only(model)
    assert "has weights that a LlamaForCausalLM has no place for: model.layers.0.bias, score.weight" in what
    rewrite(
        model / "model.safetensors", lambda weights: without("score")(without("0.bias")(weights)) | {"rotary_emb.inv_freq": torch.ones(4)}
    )
    assert check(given(model)) == []  # a buffer of older versions


def test_other_shapes_are_named(model: Path) -> None:
    configure(model, intermediate_size=64)
    errors = check(given(model))
    assert [error.what.split(" has ")[0].split(" ")[-1] for error in errors] == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")
    ]
    assert "has the shape (32, 48), and by its config.json (32, 64)" in errors[0].what


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_no_base(model: Path, llama: LlamaForCausalLM, tied: bool) -> None:
    llama.config.tie_word_embeddings = tied
    llama.config.num_labels = 1
    AutoModelForSequenceClassification.from_config(llama.config).save_pretrained(model)
    what, remedy = only(model)
    assert "is a LlamaForSequenceClassification, a reward model or classifier, and no language model" in what
    assert "language model that it was made from" in remedy
    configure(model, architectures=["LlamaForCausalLM"])  # as it is where somebody put it right
    assert any("score.weight" in error.what for error in check(given(model)))


def test_experts_that_are_missing_are_refused(model: Path, llama: LlamaForCausalLM) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=400, num_local_experts=4, **sizes, **ENDS)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    assert check(given(model)) == []
    whole = load_file(model / "model.safetensors")
    for lacking, said in (
        ("layers.1.block_sparse_moe.experts.", "has no weights for model.layers.1.mlp.experts.down_proj"),
        (
            "layers.1.block_sparse_moe.experts.3.",
            "model.layers.1.mlp.experts.down_proj has the shape (3, 32, 16), and by its config.json (4,",
        ),
        ("layers.1.block_sparse_moe.experts.3.w1.", "has weights that cannot be put together"),
    ):
        save_file(without(lacking)(whole), model / "model.safetensors", metadata={"format": "pt"})
        assert said in check(given(model))[0].what


# ------------------------------------------------------------------------------------------- files that are not what they seem


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
