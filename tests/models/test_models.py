"""Tokenizer, policy and scalar models: what is saved is what any Hugging Face program opens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from rlhf.errors import UserError
from rlhf.models.dialogues import encode_dialogue, encode_dialogues
from rlhf.models.packed import pack
from rlhf.models.policy import load_policy
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel, initialise_head, load_scalar, padding_beside_end, save_scalar
from rlhf.models.templates import settle
from rlhf.models.tokenizer import build_tokenizer, end_of_turn, load_tokenizer, template

# ------------------------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "What is 2+2?",
        " two  spaces\n\nlines\t",
        "naïve — “quoted”",
        "小さい犬",
        "🙂👩‍👩‍👧",
        "1234567890",
        "\x00\x7f\u200b\ufeff",
        "word ." * 3,
        "",
    ],
)
def test_every_string_can_be_written_and_read_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_are_single_and_different(tokenizer: PreTrainedTokenizerFast) -> None:
    named = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert [len(tokenizer.encode(token)) for token in named] == [1] * 5
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 400


def test_the_tokenizer_is_a_function_of_its_texts() -> None:
    texts = ["What is the capital of France?", "The capital of France is Paris."] * 3
    one, same, other = (build_tokenizer(given, 300, 64).backend_tokenizer.to_str() for given in (texts, texts, texts[:1]))
    assert one == same
    assert one != other


def test_a_saved_tokenizer_is_the_same_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    asked = [{"role": "user", "content": "Hi 🙂"}]
    assert loaded.apply_chat_template(asked, tokenize=False) == tokenizer.apply_chat_template(asked, tokenize=False) == "<|user|>Hi 🙂"
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"the tokenizer has no chat template .*base\.chat_template: turns"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no tokenizer could be read"):
        load_tokenizer(tmp_path / "nowhere")


def words_only(chat_template: str) -> PreTrainedTokenizerFast:
    """A tokenizer as other models have them: an end of text, an end of turn, no pad token."""
    core = Tokenizer(models.WordLevel({"<eos>": 0, "<turn>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", extra_special_tokens=["<turn>"])
    fast.chat_template = chat_template
    return fast


def test_the_end_of_turn_is_what_the_template_writes_after_an_answer() -> None:
    writes_it = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
    writes_none = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn(words_only(writes_it)) == "<turn>"
    assert end_of_turn(words_only(writes_none)) == "<eos>"
    assert end_of_turn(words_only(template("turns"))) == "<eos>"


# --------------------------------------------------------------------------------------------------------------------- policy


@torch.no_grad()
def test_a_saved_policy_is_an_ordinary_folder(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_model(llama, tokenizer, tmp_path)
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in tmp_path.iterdir()
    }
    ids = torch.tensor([tokenizer.encode("What is the capital of France?")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, llama(ids).logits)
    assert loaded.config.use_cache
    read: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == read.eos_token_id == tokenizer.eos_token_id
    assert read.padding_side == "left"  # an answer follows its prompt
    assert loaded.generation_config.do_sample is False
    assert torch.equal(load_policy(tmp_path, "fp32")(ids).logits, llama(ids).logits)
    assert load_policy(tmp_path, "bf16").dtype == torch.bfloat16


FLAGS = ("lstrip", "normalized", "rstrip", "single_word")
SCALED = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
EARLIER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what a config is made of, what transformers 4 finds of it
    "llama": ({"rope_theta": 5e5, "rope_scaling": SCALED}, {"rope_theta": 5e5, "rope_scaling": SCALED}),
    "qwen2": ({"rope_theta": 1e6}, {"rope_theta": 1e6}),
    "gpt_neox": ({"rotary_pct": 1.0, "rotary_emb_base": 5e4}, {"rotary_pct": 1.0, "rotary_emb_base": 5e4}),
    "phi": ({"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25}),
    "phi3": ({"rope_scaling": LONG, "original_max_position_embeddings": 64}, {"rope_theta": 1e4, "rope_scaling": LONG}),
    "gemma3_text": ({"head_dim": 8}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
}


@pytest.mark.parametrize("family", EARLIER)
def test_a_saved_policy_has_the_names_that_transformers_4_reads(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    given, expected = EARLIER[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes, vocab_size=400, pad_token_id=0, **copy.deepcopy(given))
    ).eval()
    save_model(model, tokenizer, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {name: written.get(name) for name in expected} == expected
    ids = torch.arange(5, 105)[None]
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)  # and 5 is not led astray
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_folder_without_a_model_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"nowhere: cannot be a causal language model"):
        load_policy(tmp_path / "nowhere", "fp32")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(UserError, match=r"cannot be a causal language model"):
        load_policy(tmp_path, "fp32")
    with pytest.raises(UserError, match=r"cannot be a reward model"):
        load_scalar(tmp_path, tokenizer, "fp32")


def test_a_model_that_lacks_weights_is_refused(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_model(llama, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be a causal language model: no weights for model\.norm\.weight"):
        load_policy(tmp_path, "fp32")
    with pytest.raises(UserError, match=r"cannot be a reward model: no weights for model\.norm\.weight"):
        load_scalar(tmp_path, tokenizer, "fp32")


def test_a_folder_that_holds_something_else_is_refused(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_model(llama, tokenizer, tmp_path / "whole")
    load_scalar(tmp_path / "whole", tokenizer, "fp32").model.save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match=r"reward: cannot be a causal language model: it is a reward model"):
        load_policy(tmp_path / "reward", "fp32")
    settings = json.loads((tmp_path / "whole/config.json").read_text(encoding="utf-8"))
    (tmp_path / "whole/config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"other shapes than its config\.json says for model\.layers\.0\.mlp\.down_proj\.weight, "):
        load_policy(tmp_path / "whole", "fp32")
    weights = tmp_path / "whole/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"cannot be a causal language model \(.*incomplete metadata"):
        load_policy(tmp_path / "whole", "fp32")
    (tmp_path / "whole/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        load_policy(tmp_path / "whole", "fp32")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_is_off_while_training(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(1)
    if family == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    else:
        sizes = OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16)
        sizes.layerdrop = sizes.attention_dropout = 0.5
        model = OPTForCausalLM(sizes)
    ids = torch.arange(10)[None]
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path)
    policy, scalar = load_policy(tmp_path, "fp32").train(), load_scalar(tmp_path, tokenizer, "fp32").train()
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    assert torch.equal(scalar(input_ids=ids), scalar(input_ids=ids))


# -------------------------------------------------------------------------------------------------------------- scalar models


@pytest.fixture
def scalar(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> ScalarModel:
    """A reward model on the tiny Llama's backbone."""
    save_model(llama, tokenizer, tmp_path / "base")
    model = load_scalar(tmp_path / "base", tokenizer, "fp32").eval()
    initialise_head(model, 1)
    return model


def rows(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    texts = ["What is the capital of France?", "Paris.", "The opposite of hot is cold. Glad you asked!"]
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]


@torch.no_grad()
@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_the_score_is_read_at_the_last_real_token(scalar: ScalarModel, tokenizer: PreTrainedTokenizerFast, pad: str) -> None:
    given = rows(tokenizer)
    packed = pack(given, "cpu")
    together = scalar(**packed.inputs)[packed.last]
    alone = torch.stack([scalar(input_ids=torch.tensor([ids]))[-1] for ids in given])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    by_hand = [scalar.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] @ scalar.head.weight[0] for ids in given]
    torch.testing.assert_close(together, torch.stack(by_hand), rtol=1e-4, atol=1e-5)
    assert together.std() > 0


@torch.no_grad()
def test_a_saved_reward_model_opens_as_a_classifier_with_one_label(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    scalar.model.config.reward_mean, scalar.model.config.reward_std = 0.25, 2.0
    save_model(scalar.model, tokenizer, tmp_path / "reward")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert opened.config.num_labels == 1
    for ids in rows(tokenizer):
        torch.testing.assert_close(opened(torch.tensor([ids])).logits[0, 0], scalar(input_ids=torch.tensor([ids]))[-1])
    loaded = load_scalar(tmp_path / "reward", tokenizer, "fp32")
    assert (loaded.mean, loaded.std) == (0.25, 2.0)
    assert torch.equal(loaded.head.weight, scalar.head.weight)


def test_a_score_in_half_precision_is_rounded_no_further(scalar: ScalarModel) -> None:
    half = copy.deepcopy(scalar).bfloat16()
    with torch.no_grad():
        half.head.weight.add_(1.0)  # far from 0
    ids = torch.arange(40)[None]
    found = half(input_ids=ids)
    hidden = half.model.base_model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(found, hidden.float() @ half.head.weight[0].float(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_transformers_reads_a_saved_reward_model_at_the_end_token(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, pad: str
) -> None:
    scalar.model.config.reward_mean, scalar.model.config.reward_std = 0.25, 2.0
    tokenizer = copy.deepcopy(tokenizer)  # the others' stays as it is
    tokenizer.pad_token = pad
    tokenizer.chat_template = str(tokenizer.chat_template).replace("{{- eos_token -}}", "{{- eos_token + '\\n' -}}")  # as many write
    dialogues = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}] for answer in ("So.", "I do not know.")]
    expected = [scalar(input_ids=torch.tensor([ids]))[-1] for ids, _ in encode_dialogues(tokenizer, dialogues)]
    job: Any = SimpleNamespace(is_main=True)
    save_scalar(job, scalar, tokenizer, tmp_path / "reward", None)
    # as docs/own-model.md has it
    read: Any = AutoTokenizer.from_pretrained(tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    texts = [read.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
    assert all(text.endswith(read.eos_token) for text in texts)
    logits = model(**read(texts, add_special_tokens=False, padding=True, return_tensors="pt", return_token_type_ids=False)).logits
    torch.testing.assert_close(logits[:, 0], torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert read.pad_token != read.eos_token
    assert read.padding_side == "right"
    pipe: Any = pipeline("text-classification", str(tmp_path / "reward"), add_special_tokens=False)
    assert [one["score"] for one in pipe(texts)] == pytest.approx([float(score) for score in expected], abs=1e-5)  # and not its sigmoid


@pytest.mark.parametrize("form", ["special", "turns", "parts", "two ends"])
def test_templates_of_saved_models_are_read_by_others_than_transformers(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, form: str
) -> None:
    """llama.cpp and transformers.js have a Jinja of their own, with some of Python's methods."""
    minijinja = pytest.importorskip("minijinja", reason="minijinja is not installed: pip install -c constraints.txt -e '.[dev]'")
    tokenizer = copy.deepcopy(tokenizer)
    of_parts = "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    two_ends = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )  # as Phi 3's
    tokenizer.chat_template = {"parts": of_parts, "two ends": two_ends}.get(form) or template(form)
    assert len(settle(tokenizer)) == (form == "parts")
    save_model(scalar.model, tokenizer, tmp_path / "policy")
    job: Any = SimpleNamespace(is_main=True)
    save_scalar(job, scalar, tokenizer, tmp_path / "reward", None)
    messages = [{"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Why?"), ("assistant", "So."))]
    for name in ("policy", "reward"):
        read: Any = AutoTokenizer.from_pretrained(tmp_path / name)
        texts = {"template": (tmp_path / name / "chat_template.jinja").read_text(encoding="utf-8")}
        others = minijinja.Environment(
            templates=texts, pycompat=True, trim_blocks=True, lstrip_blocks=True, auto_escape_callback=lambda _: False
        )
        for said, answer_follows in ((messages, False), (messages[:2], True)):
            known = {"messages": said, "add_generation_prompt": answer_follows, "eos_token": read.eos_token}
            expected = read.apply_chat_template(said, tokenize=False, add_generation_prompt=answer_follows)
            assert others.render_template("template", **known) == expected
            if name == "reward" and not answer_follows:
                assert tokenizer.decode(encode_dialogue(tokenizer, said)[0]) == expected


def test_a_file_that_others_read_is_handed_on_from_model_to_model(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(llama, tokenizer, tmp_path / "base")
    assert not (tmp_path / "base/tokenizer.model").exists()
    (tmp_path / "base/tokenizer.model").write_bytes(b"of SentencePiece")
    save_model(llama, load_tokenizer(tmp_path / "base"), tmp_path / "sft")
    save_model(llama, load_tokenizer(tmp_path / "sft"), tmp_path / "ppo")
    assert (tmp_path / "ppo/tokenizer.model").read_bytes() == b"of SentencePiece"
    read = load_tokenizer(tmp_path / "ppo")
    assert read.encode("Hi<|user|>") == tokenizer.encode("Hi<|user|>")
    # those that SentencePiece knows nothing of
    names = json.loads((tmp_path / "ppo/tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    assert names[str(tokenizer.eos_token_id)] == {"content": "<|end|>", "special": True, **dict.fromkeys(FLAGS, False)}


def test_a_tokenizer_of_no_folder_takes_no_file_of_where_it_happens_to_be(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"of another")
    monkeypatch.chdir(tmp_path)
    save_model(llama, tokenizer, tmp_path / "base")
    assert not (tmp_path / "base/tokenizer.model").exists()


def test_a_tokenizer_that_has_no_other_special_token_pads_scores_with_none(tokenizer: PreTrainedTokenizerFast) -> None:
    assert padding_beside_end(tokenizer) == "<|pad|>"
    bare = SimpleNamespace(chat_template=template("turns"), added_tokens_decoder={}, eos_token="<|end|>", bos_token=None)
    assert padding_beside_end(cast(PreTrainedTokenizerFast, bare)) is None


def test_the_head_is_small_and_seeded(scalar: ScalarModel) -> None:
    first = scalar.head.weight.clone()
    assert scalar.head.bias is None
    initialise_head(scalar, 2)
    assert not torch.equal(scalar.head.weight, first)
    initialise_head(scalar, 1)
    assert torch.equal(scalar.head.weight, first)
    # 32 draws from N(0, 1/√33): their root mean square is within half of that
    assert 0.5 < first.square().mean().sqrt().item() * 33**0.5 < 1.5
