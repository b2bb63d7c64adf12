"""Chat templates and tokenizers as models come with them: what is mended when a model is pinned, and what is refused before it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models.dialogues import encode_dialogue
from rlhf.models.given import check, pin
from rlhf.models.tokenizer import load_tokenizer
from tests.models.test_given import given

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a red fruit."}
ANSWER = {"role": "assistant", "content": "A cherry."}
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# as Llama 3.1's and Granite's: the one asks whether there is a clock, the other only asks
GUARDED = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% else %}{% set d = 'no day' %}{% endif %}"
DATED = "{{ '<|im_start|>system\nToday Date: ' + d + '<|im_end|>\n' }}" + TURNS + ASKS
ASKING = "\n  {% set form = '%B %d, %Y' %}  Today's Date: {{ strftime_now(form) }}.\n" + TURNS + ASKS
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}{% if p['type']=='text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS + ASKS


@pytest.fixture
def model(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The folder of a model that has tokens for turns, among which the tokenizer does not name them special."""
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    chat = load_tokenizer(folder)
    chat.add_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    chat.save_pretrained(folder)
    llama.resize_token_embeddings(len(chat))
    llama.save_pretrained(folder)
    return folder


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def rendered(folder: Path, *messages: dict[str, Any], **options: Any) -> str:
    return str(load_tokenizer(folder).apply_chat_template(list(messages), tokenize=False, **options))


# ------------------------------------------------------------------------------------------------------------- what is mended


@pytest.mark.parametrize(
    ("template", "day"), [(GUARDED + DATED, "Today Date: 26 Jul 2024<"), (ASKING, "  Today's Date: July 26, 2024.\n<")]
)
def test_a_template_that_asks_the_clock_says_one_day_for_good(
    model: Path, tmp_path: Path, template: str, day: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rendered(with_template(model, template), USER, ANSWER, add_generation_prompt=True)
    assert check(given(model)) == []
    assert pin(given(model), tmp_path / "to") == ["the chat template asks for the date: pinned, it says 26 July 2024 for good"]
    after = rendered(tmp_path / "to", USER, ANSWER, add_generation_prompt=True)
    assert day in after
    assert (before.split("Date: ")[0], before.split("<|im_start|>user")[1]) == (
        after.split("Date: ")[0],
        after.split("<|im_start|>user")[1],
    )
    assert "Date" in before
    assert after.partition(day)[2]


def test_a_template_over_parts_takes_texts_once_it_is_pinned(model: Path, tmp_path: Path) -> None:
    assert "Name" not in rendered(with_template(model, PARTS), USER)
    assert check(given(model)) == []
    (note,) = pin(given(model), tmp_path / "to")
    assert "takes contents in parts" in note
    expected = "<|im_start|>user\nName a red fruit.<|im_end|>\n<|im_start|>assistant\nA cherry.<|im_end|>\n"
    assert rendered(tmp_path / "to", USER, ANSWER) == expected
    parts = USER | {"content": [{"type": "text", "text": USER["content"]}]}
    assert rendered(tmp_path / "to", parts, ANSWER) == expected
    tokenizer = load_tokenizer(tmp_path / "to")
    ids, mask = encode_dialogue(tokenizer, [SYSTEM, USER, ANSWER])
    assert tokenizer.decode([token for token, counted in zip(ids, mask, strict=True) if counted]) == "A cherry.<|im_end|>"


def test_the_end_of_a_turn_need_not_be_special(model: Path, tmp_path: Path) -> None:
    assert pin(given(with_template(model, TURNS + ASKS)), tmp_path / "to") == []
    assert load_tokenizer(tmp_path / "to").eos_token == "<|im_end|>"


def test_the_default_of_several_templates_is_taken(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": PARTS}, {"name": "tool_use", "template": TURNS}]
    configure(model, chat_template=named)
    pin(given(model), tmp_path / "to")
    assert "Name a red fruit." in rendered(tmp_path / "to", USER)
    assert load_tokenizer(tmp_path / "to").chat_template["tool_use"] == TURNS


# ------------------------------------------------------------------------------------------------------------ what is refused


def only(folder: Path, *dialogues: list[dict[str, str]]) -> tuple[str, str]:
    (error,) = check(given(folder), dialogues)
    assert error.what.startswith(f"base.model '{folder}'")
    if not dialogues:
        with pytest.raises(UserError):
            pin(given(folder), folder / "to")
    return error.what, error.remedy


def test_several_templates_without_a_default_are_refused(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    configure(model, chat_template=[{"name": "chat", "template": TURNS}, {"name": "rag", "template": TURNS}])
    what, remedy = only(model)
    assert "its tokenizer has chat templates named chat, rag, and none is the default" in what
    assert "tokenizer_config.json" in remedy
    assert check(given(model, chat_template="turns")) == []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}\n{{ m['content' }}{% endfor %}", "the chat template has a slip in line 2: "),
        ("{% for m in messages %}{{ m.content }}", "the chat template has a slip in line 1: "),
        (TURNS.replace("m['content']", "m['content'] | nothing"), "the chat template has a slip in line 2: No filter named 'nothing'"),
        (TURNS.replace("m['content']", "m['content'] + 1"), "the chat template refuses a dialogue of user: "),
        (TURNS.replace("m['content']", "m['text']"), "the chat template refuses a dialogue of user: "),
        (TURNS.replace("m['content']", "''"), "the chat template leaves out what user says"),
        (TURNS.replace("<|im_end|>", ""), "the chat template writes no end token (<|end|>) after an answer"),
        ("{{ messages[0]['content'] }}", "the chat template writes no end token"),
        ("{{ raise_exception('Not today') }}", "the chat template refuses a dialogue of user: Not today"),
    ],
)
def test_a_template_that_fails_is_refused(model: Path, template: str, said: str) -> None:
    what, remedy = only(with_template(model, template))
    assert said in what
    assert "base.chat_template: turns" in remedy


@pytest.mark.parametrize("draws", ["{{ ['Hi', 'Hello'] | random }}", "{{ ['Hi']|random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(model: Path, draws: str) -> None:
    (error,) = check(given(with_template(model, draws + TURNS + ASKS)))
    assert "its chat template draws at random" in error.what
    assert "base.chat_template: turns" in error.remedy
    assert check(given(model, chat_template="turns")) == []


def test_rows_that_a_template_refuses_or_leaves_out_are_named(model: Path) -> None:
    assert check(given(with_template(model, NO_SYSTEM)), [[USER, ANSWER]]) == []
    what, _ = only(model, [SYSTEM, USER], [SYSTEM, USER, ANSWER], [SYSTEM, USER, ANSWER])
    assert "the chat template refuses a dialogue of system, user" in what
    assert what.endswith("System role not supported")
    trimming = TURNS.replace("m['content']", "m['content'] | trim | replace('\n', ' ')") + ASKS
    assert check(given(with_template(model, trimming)), [[USER | {"content": " Two\nlines\n"}, ANSWER]]) == []
    dropping = TURNS.replace("messages %}", "messages if m['role'] != 'system' %}")
    assert "the chat template leaves out what system says" in only(with_template(model, dropping + ASKS), [SYSTEM, USER, ANSWER])[0]
    assert check(given(model, chat_template="turns"), [[SYSTEM, USER, ANSWER]]) == []


def test_a_row_that_a_template_refuses_is_named_where_it_is_read(model: Path, tmp_path: Path) -> None:
    pin(given(with_template(model, NO_SYSTEM)), tmp_path / "to")
    with pytest.raises(UserError, match="refuses a dialogue of system, user: System role not supported"):
        encode_dialogue(load_tokenizer(tmp_path / "to"), [SYSTEM, USER, ANSWER])


def test_a_tokenizer_without_end_token_is_refused_where_its_template_writes_none(model: Path) -> None:
    configure(model, eos_token=None)
    assert check(given(with_template(model, TURNS + ASKS))) == []
    what, remedy = only(with_template(model, TURNS.replace("<|im_end|>", "")))
    assert "its tokenizer has no end token, and its chat template writes none after an answer" in what
    assert "`eos_token` in the model's tokenizer_config.json" in remedy
    (error,) = check(given(model, chat_template="turns"))
    assert "no end token" in error.what


def test_more_tokens_than_the_model_has_are_refused(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    configure(model, pad_token="<new>")
    what, remedy = only(with_template(model, TURNS + ASKS))
    assert "its tokenizer has 403 tokens, the last '<new>', and config.json says vocab_size 402" in what
    assert "resize_token_embeddings" in remedy


def test_a_pad_token_beyond_the_model_in_its_config_alone_is_replaced(model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"pad_token_id": 5000, "eos_token_id": [3, 4]}))
    pin(given(with_template(model, TURNS + ASKS)), tmp_path / "to")
    settings = json.loads((tmp_path / "to/config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == load_tokenizer(tmp_path / "to").eos_token_id
    assert settings["pad_token_id"] == load_tokenizer(tmp_path / "to").pad_token_id


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}', "[]"])
def test_a_tokenizer_that_is_absent_or_damaged_is_refused(model: Path, content: str | None) -> None:
    if content is None:
        (model / "tokenizer.json").unlink()
    else:
        (model / "tokenizer.json").write_text(content)
    what, remedy = only(model)
    assert "its tokenizer " in what
    assert "tokenizer.json" in remedy


def test_a_tokenizer_that_cannot_be_written_again_is_refused(model: Path) -> None:
    configure(model, padding_side="left", name_of_its_own="\ud800")
    assert "its tokenizer cannot be read: 'utf-8' codec can't encode" in only(model)[0]


def test_a_tokenizer_without_words_is_refused(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    settings = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 402}
    (model / "config.json").write_text(json.dumps(settings))
    assert "its tokenizer has no words: the folder lacks the tokenizer's files" in check(given(model))[0].what
