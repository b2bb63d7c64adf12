"""Dialogues, prompts and passages as token ids."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data.sandbox import make_rows
from rlhf.errors import UserError
from rlhf.models.dialogues import blocks, decode_answer, encode_dialogue, encode_dialogues, encode_prompt
from rlhf.models.tokenizer import template

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is the opposite of hot?"}
ANSWER = {"role": "assistant", "content": "The opposite of hot is cold."}
AGAIN = {"role": "user", "content": "Thanks! And of big?"}
LAST = {"role": "assistant", "content": " small — 小さい 🙂"}

# ------------------------------------------------------------------------------------------------------------------ dialogues

ROWS = make_rows("pairs", 60, 1, 0.0)
RENDERED = {
    "special": (
        "<|system|>Be brief.<|user|>What is the opposite of hot?<|assistant|>The opposite of hot is cold.<|end|>"
        "<|user|>Thanks! And of big?<|assistant|> small — 小さい 🙂<|end|>"
    ),
    "turns": (
        "Be brief.\n\nHuman: What is the opposite of hot?\n\nAssistant: The opposite of hot is cold.<|end|>"
        "\n\nHuman: Thanks! And of big?\n\nAssistant:  small — 小さい 🙂<|end|>"
    ),
}
COUNTED = {
    "special": ["The opposite of hot is cold.<|end|>", " small — 小さい 🙂<|end|>"],
    "turns": [" The opposite of hot is cold.<|end|>", "  small — 小さい 🙂<|end|>"],
}


@pytest.fixture(params=["special", "turns"])
def templated(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gives the tokenizer one of the chat templates for the time of a test."""
    monkeypatch.setattr(tokenizer, "chat_template", template(request.param))
    return request.param


def spans(mask: list[int]) -> list[slice]:
    """Where the mask is 1, run by run."""
    edges = [i for i in range(len(mask) + 1) if ([0, *mask, 0][i]) != ([0, *mask, 0][i + 1])]
    return [slice(first, end) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def test_the_mask_covers_the_assistants_tokens_and_end_tokens_alone(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = encode_dialogue(tokenizer, [SYSTEM, USER, ANSWER, AGAIN, LAST])
    assert tokenizer.decode(ids) == RENDERED[templated]
    assert [tokenizer.decode(ids[span]) for span in spans(mask)] == COUNTED[templated]
    assert [ids[span][-1] for span in spans(mask)] == [tokenizer.eos_token_id] * 2


def test_a_prompt_is_the_beginning_of_its_dialogue(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt, answer in (([USER], ANSWER), ([SYSTEM, USER], ANSWER), ([USER, ANSWER, AGAIN], LAST)):
        asked = encode_prompt(tokenizer, prompt)
        ids, mask = encode_dialogue(tokenizer, [*prompt, answer])
        assert ids[: len(asked)] == asked
        assert mask[len(asked) :] == [1] * (len(ids) - len(asked))
        assert mask[len(asked) - 1] == 0
        assert decode_answer(tokenizer, ids[len(asked) :]) == answer["content"].strip()


def test_what_a_template_writes_behind_an_answers_end_is_not_learnt(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phi 3's writes an end of the whole dialogue behind the end of its last turn, and both are one token once the turn's is the end."""
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content + eos_token + '\n' }}{% endfor %}"
    ending = "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", turns + ending)
    for dialogue, said in (([USER, ANSWER], [ANSWER]), ([USER, ANSWER, AGAIN, LAST], [ANSWER, LAST])):
        ids, mask = encode_dialogue(tokenizer, dialogue)
        assert [tokenizer.decode(ids[span]) for span in spans(mask)] == [f"{turn['content']}<|end|>" for turn in said]
        assert sum(mask[-1:]) == 1


def test_a_template_that_rewrites_earlier_turns_counts_the_last_answer_only(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as templates do that drop the thoughts of earlier turns
    rewriting = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role == 'user' else '…' }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    ids, mask = encode_dialogue(tokenizer, [USER, ANSWER, AGAIN, LAST])
    assert (
        tokenizer.decode(ids)
        == f"<|user|>{USER['content']}<|assistant|>…<|end|><|user|>{AGAIN['content']}<|assistant|>{LAST['content']}<|end|>"
    )
    assert [tokenizer.decode(ids[span]) for span in spans(mask)] == [LAST["content"] + "<|end|>"]
    asked = encode_prompt(tokenizer, [USER, ANSWER, AGAIN])
    assert ids[: len(asked)] == asked


def test_many_dialogues_at_once_are_the_same_ids_as_each_alone(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [[*row["prompt"], {"role": "assistant", "content": row[side]}] for row in ROWS for side in ("chosen", "rejected")]
    dialogues = [*pairs, [USER], [SYSTEM, USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER, AGAIN, LAST], [USER]]
    together = encode_dialogues(tokenizer, dialogues)
    assert together == [encode_dialogue(tokenizer, dialogue) for dialogue in dialogues]
    # by hand: each piece of the rendered text tokenized for itself
    for dialogue, (ids, mask) in zip(pairs, together, strict=False):
        before = str(tokenizer.apply_chat_template(dialogue[:-1], tokenize=False, add_generation_prompt=True))
        answer = str(tokenizer.apply_chat_template(dialogue, tokenize=False))[len(before) :].rstrip()
        prompt, said = tokenizer.encode(before), tokenizer.encode(answer)
        if len(dialogue) == 2:
            assert (ids, mask) == (prompt + said, [0] * len(prompt) + [1] * len(said))
    assert encode_dialogues(tokenizer, []) == []


def test_passages_follow_each_other_in_rows_of_one_width(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["What is the capital of France?", "The opposite of hot is cold.", "One more."]
    rows = blocks(texts, tokenizer, 5)
    assert {len(row) for row in rows} == {5}
    stream = "<|end|>".join(texts) + "<|end|>"
    ids = tokenizer.encode(stream)
    assert [token for row in rows for token in row] == ids[: len(ids) // 5 * 5]
    assert blocks(texts[2:], tokenizer, 100) == []


# ------------------------------------------------------------------------------------------------------ marks, tools, refusals

CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "hot"}}}]
CALLING: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": CALLS}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]


def counted(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> list[str]:
    ids, mask = encode_dialogue(tokenizer, messages)
    return [str(tokenizer.decode(ids[span])).strip() for span in spans(mask)]


def test_an_answer_of_weight_0_is_read_and_not_counted(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    marked: list[dict[str, Any]] = [SYSTEM, USER, {**ANSWER, "weight": 0}, AGAIN, LAST]
    assert counted(tokenizer, marked) == [f"{LAST['content']}<|end|>".strip()]
    assert encode_dialogue(tokenizer, marked)[0] == encode_dialogue(tokenizer, [SYSTEM, USER, ANSWER, AGAIN, LAST])[0]


def test_calls_of_tools_are_counted_and_their_results_are_not(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [USER | {"tools": TOOLS}, CALLING, {"role": "tool", "content": "cold"}, ANSWER]
    text = str(tokenizer.decode(encode_dialogue(tokenizer, messages)[0]))
    call = 'Calls: [{"name": "look_up", "arguments": {"word": "hot"}}]<|end|>'
    assert counted(tokenizer, messages)[0].endswith(call)
    assert counted(tokenizer, messages)[1:] == [f"{ANSWER['content']}<|end|>"]
    assert text.index('"parameters": {}') < text.index(USER["content"]) < text.index(call) < text.index("cold")


def test_a_template_that_refuses_a_dialogue_says_so(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + template("special"))
    encode_dialogue(tokenizer, [USER, ANSWER])
    with pytest.raises(UserError, match="refuses a dialogue of system, user: System role not supported"):
        encode_dialogue(tokenizer, [SYSTEM, USER, ANSWER])


def test_what_would_be_lost_of_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    # asks for an answer in other words than it writes one in
    thinking = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", thinking + "{% if add_generation_prompt %}<|assistant|><think>{% endif %}")
    assert counted(tokenizer, [USER, ANSWER]) == [f"{ANSWER['content']}<|end|>"]
    with pytest.raises(UserError, match="so that its tool_calls cannot be learnt"):
        encode_dialogue(tokenizer, [USER, CALLING])
