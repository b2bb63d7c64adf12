"""Whether a chat template takes the data: tried on an example of each form of dialogue, before anything trains."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models.dialogues import MEND, Messages, encode_dialogue, render

SHOWN = 5


def check(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Mapping[str, Any]]) -> None:
    """Check that the chat template renders each example whole.

    Args:
        examples: `row` (its file and line) and `messages`, as rlhf.data.examples makes them.

    Raises:
        UserError: names the rows, and what is wrong with them.
    """
    found = [f"{example['row']}: {what}" for example in examples if (what := problem(tokenizer, example["messages"]))]
    if found:
        more = f"; and {len(found) - SHOWN} more forms of dialogues" if len(found) > SHOWN else ""
        raise UserError(f"{'; '.join(found[:SHOWN])}{more}; each stands for all rows of its form", remedy=MEND)


def problem(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    """What a chat template refuses of a dialogue, or leaves out."""
    asks = messages[-1]["role"] != "assistant"
    try:
        text = render(tokenizer, messages, answer_follows=asks)
        _, mask = encode_dialogue(tokenizer, messages)
    except UserError as error:
        return error.what
    if lost := [name for name, said in _shown(messages) if not _stands_in(said, text)]:
        return f"the chat template leaves out {lost[0]}"
    return None if asks or any(mask) else "the chat template shows no answer that could be learnt"


def _shown(messages: Messages) -> Iterable[tuple[str, str]]:
    """What must stand in the text of a dialogue, by names for people. Earlier answers may lose their thoughts."""
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            yield f"what {message['role']} says", message["content"]
        for tool in message.get("tools", ()):
            yield "the tools", str(tool["function"].get("name", ""))
        for call in message.get("tool_calls", ()):
            yield "calls of tools", call["function"]["name"]
        for name in ("reasoning_content", "reasoning", "thinking") if number == len(messages) else ():
            yield f"the answer's {name}", message.get(name, "")


def _stands_in(said: str, text: str) -> bool:
    # a template may write it as JSON, or trim and wrap it
    return json.dumps(said, ensure_ascii=False)[1:-1].strip() in text or "".join(said.split()) in "".join(text.split())
