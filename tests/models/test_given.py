"""Models as people have them: each that would train on noise, or die late, is refused with its remedy before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
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
    (model / "tokenizer.model").write_bytes(b"of SentencePiece")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|user|>{% endfor %}")
    pin(given(model), tmp_path / "kept")
    kept, config = load_tokenizer(tmp_path / "kept"), AutoConfig.from_pretrained(tmp_path / "kept")
    assert kept.padding_side == "left"
    assert (tmp_path / "kept/tokenizer.model").read_bytes() == b"of SentencePiece"
    # this template ends a turn with another token than the end of text
    assert kept.eos_token == kept.pad_token == "<|user|>"
    assert (config.eos_token_id, config.pad_token_id) == (kept.eos_token_id, kept.pad_token_id)
    assert GenerationConfig.from_pretrained(tmp_path / "kept").eos_token_id == kept.eos_token_id
    pin(given(model, chat_template="turns"), tmp_path / "turns")
    plain = load_tokenizer(tmp_path / "turns")
    assert plain.eos_token == "<|end|>"
    assert plain.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) == "Human: Hi\n\nAssistant:"


def test_a_tokenizer_that_its_class_does_not_fit_is_taken_from_its_file(model: Path, tmp_path: Path) -> None:
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["backend"]
    path.write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizerFast"}), encoding="utf-8")
    text = "What is the capital of France?"
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    assert AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"] != ids
    pin(given(model), tmp_path / "to")
    kept = load_tokenizer(tmp_path / "to")
    assert kept(text, add_special_tokens=False)["input_ids"] == ids
    assert kept.decode(ids) == text


def test_turns_that_have_other_tokens_by_themselves_are_told_of(model: Path, tmp_path: Path) -> None:
    assert pin(given(model, chat_template="turns"), tmp_path / "turns") == []
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (note,) = pin(given(model), tmp_path / "to")
    assert "otherwise than the whole dialogue: Ġ " in note


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


def test_a_tied_model_with_its_output_layer_alone_is_named(model: Path) -> None:
    rewrite(model / "model.safetensors", renamed("model.embed_tokens", "lm_head"))  # transformers ties it, but makes no reward model of it
    assert "has no weights for model.embed_tokens.weight, which would be random in a reward model" in only(model)[0]


def test_names_without_the_prefix_of_the_backbone_are_known(model: Path, tmp_path: Path, llama: LlamaForCausalLM) -> None:
    name = "model.embed_tokens.weight"
    rewrite(model / "model.safetensors", renamed("model.", ""))
    pin(given(model), tmp_path / "to")
    assert torch.equal(load_policy(tmp_path / "to", "fp32").state_dict()[name], llama.state_dict()[name])


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


def test_a_config_of_wrong_values_is_refused_with_what_is_wrong(model: Path) -> None:
    configure(model, num_attention_heads=3)
    what, _ = only(model)
    assert "(32) is not a multiple of the number of attention heads (3)" in what


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
