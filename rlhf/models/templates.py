"""Chat templates as models come with them: made to say the same every day and to take texts, and tried before anything trains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError, first_line
from rlhf.models.dialogues import Messages, encode_dialogue

# the day that a template is told which asks for today's; Llama 3.1's own template names it where it may not ask
DATE = datetime(2024, 7, 26)
# contents are texts in all stages; a template over parts shows nothing of one, and some fail
PARTS = (
    "{%- set taken = namespace(messages=[]) %}{%- for message in messages %}{%- set content = message['content'] %}"
    "{%- if content is string %}{%- set content = [{'type': 'text', 'text': content}] %}{%- endif %}"
    "{%- set taken.messages = taken.messages + [dict(message, content=content)] %}{%- endfor %}{%- set messages = taken.messages %}\n"
)
QUESTION, ANSWER = {"role": "user", "content": "A question"}, {"role": "assistant", "content": "An answer"}
TRIED: tuple[Messages, ...] = ([QUESTION], [QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER])
REMEDY = "set base.chat_template: turns, which takes any dialogue, or mend the model's chat template"


def settle(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make a tokenizer's templates functions of the dialogue alone that take contents as texts; what was changed, for people.

    Raises:
        UserError: there are several, and none is the default.
    """
    given = tokenizer.chat_template
    if isinstance(given, dict) and "default" not in given:
        what = f"its tokenizer has chat templates named {', '.join(sorted(given))}, and none is the default"
        raise UserError(what, remedy="name one of them `default` in the model's tokenizer_config.json, or set base.chat_template: turns")
    notes: list[str] = []
    named = given if isinstance(given, dict) else {"": given}
    settled = {name: _settled(tokenizer, text, notes) for name, text in named.items()}
    tokenizer.chat_template = settled if isinstance(given, dict) else settled[""]
    return list(dict.fromkeys(notes))


def _settled(tokenizer: PreTrainedTokenizerBase, text: str, notes: list[str]) -> str:
    if "strftime_now" in text:
        text = _clock(text) + text
        notes.append(f"its chat template asks for the date: pinned, it says {DATE:%d %B %Y} for good")
    if not _shows(tokenizer, text) and _shows(tokenizer, PARTS + text):
        text = PARTS + text
        notes.append("its chat template takes contents in parts: pinned, it takes texts as well")
    return text


def _clock(text: str) -> str:
    """A macro that stands still, in the place of transformers' function. Jinja drops its line's end: what follows is as it was."""
    asked = sorted(set(re.findall(r"%[-_0^#]?[A-Za-z]", text)), key=len, reverse=True)
    known = [(form, DATE.strftime(form)) for form in asked if DATE.strftime(form) not in (form, "")]
    said = "format" + "".join(f" | replace('{form}', '{value}')" for form, value in known)
    return f"{{%- macro strftime_now(format) -%}}{{{{- {said} -}}}}{{%- endmacro %}}\n"


def _shows(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    try:
        text = str(tokenizer.apply_chat_template([QUESTION, ANSWER], chat_template=template, tokenize=False))
    except Exception:  # it may stumble over anything; `problems` says over what
        return False
    return QUESTION["content"] in text and ANSWER["content"] in text


def problems(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Messages]) -> list[UserError]:
    """What is wrong with a tokenizer's chat template on some dialogues, each thing once."""
    found = dict.fromkeys(what for messages in dialogues if (what := _problem(tokenizer, messages)))
    return [UserError(f"its chat template {what}", remedy=REMEDY) for what in found]


def _problem(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    asks = messages[-1]["role"] != "assistant"
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))
    except TemplateSyntaxError as error:
        return f"has a slip in line {error.lineno}: {error.message}"
    except Exception as error:  # what the template raises, or stumbles over
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        return f"refuses a dialogue of {roles}: {first_line(error)}"
    for message in messages:
        # an assistant's turn may lose its thoughts
        if message["role"] != "assistant" and message["content"].strip() not in text:
            return f"leaves out what {message['role']} says"
    if asks:
        return None
    answer = messages[-1]["content"].strip()
    if answer and answer in text and str(tokenizer.eos_token) not in text[text.rindex(answer) + len(answer) :]:
        return f"writes no end token ({tokenizer.eos_token}) after an answer"
    _, mask = encode_dialogue(tokenizer, messages)
    return None if any(mask) else "shows no answer that could be learnt"
