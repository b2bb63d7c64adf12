"""A row that the chat template refuses, or shows in part, is named by file and line before anything trains."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models.examples import check
from rlhf.models.tokenizer import template

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "hot"}}}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
DIALOGUES: list[list[dict[str, Any]]] = [
    [USER],
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER],
    [USER, {"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "content": "cold"}, ANSWER],
    [USER | {"tools": TOOLS}, ANSWER],
    [USER, ANSWER | {"reasoning_content": "Let me see."}],
]
EXAMPLES = [{"row": f"data/raw/mine.jsonl:{number}", "messages": messages} for number, messages in enumerate(DIALOGUES, start=1)]
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def refusal(tokenizer: PreTrainedTokenizerFast, examples: list[dict[str, Any]]) -> str:
    with pytest.raises(UserError) as caught:
        check(tokenizer, examples)
    assert "base.chat_template: turns" in caught.value.remedy
    return caught.value.what


@pytest.mark.parametrize("name", ["special", "turns"])
def test_the_projects_templates_show_all_but_thoughts(
    name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template(name))
    check(tokenizer, EXAMPLES[:-1])
    said = refusal(tokenizer, EXAMPLES)
    assert (
        said == "data/raw/mine.jsonl:6: the chat template leaves out the answer's reasoning_content; each stands for all rows of its form"
    )


def test_a_template_without_system_turns_and_tools(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refuses + PLAIN + ASKS)
    check(tokenizer, EXAMPLES[:2])
    said = refusal(tokenizer, EXAMPLES)
    assert "mine.jsonl:3: the chat template refuses a dialogue of system, user, assistant: System role not supported" in said
    assert "mine.jsonl:4: the chat template leaves out calls of tools" in said
    assert "mine.jsonl:5: the chat template leaves out the tools" in said


def test_a_template_that_skips_system_turns(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN.replace("%}<", "if m.role != 'system' %}<", 1) + ASKS)
    assert refusal(tokenizer, EXAMPLES[:3]).startswith("data/raw/mine.jsonl:3: the chat template leaves out what system says")


def test_a_template_that_ends_no_answer(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN.replace("{{ eos_token }}", "") + ASKS)
    assert "mine.jsonl:2: the chat template writes no end token" in refusal(tokenizer, EXAMPLES[:2])
