"""Chat templates as models come with them: made to say the same every day and to take texts, and tried before anything trains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models import examples
from rlhf.models.dialogues import MEND, Messages, encode_dialogue

# the day that a template is told which asks for today's; Llama 3.1's own template names it where it may not ask
DATE = datetime(2024, 7, 26)
# contents are texts in all stages; a template over parts shows nothing of one, and some fail
PARTS = (
    "{%- set taken = namespace(messages=[]) %}{%- for message in messages %}{%- set content = message['content'] %}"
    "{%- if content is string %}{%- set content = [{'type': 'text', 'text': content}] %}{%- endif %}"
    # transformers.js knows no `dict`
    "{%- set made = {'role': message['role'], 'content': content} if message | length == 2 and 'content' in message "
    "else dict(message, content=content) %}"
    "{%- set taken.messages = taken.messages + [made] %}{%- endfor %}{%- set messages = taken.messages %}\n"
)
DRAWS = re.compile(r"\|\s*random\b|\blipsum\b(?=\s*\()")
QUESTION, ANSWER = {"role": "user", "content": "A question"}, {"role": "assistant", "content": "An answer"}
TRIED: tuple[Messages, ...] = ([QUESTION], [QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER])


def settle(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make a tokenizer's templates functions of the dialogue alone that take contents as texts; what was changed, for people.

    Raises:
        UserError: there are several, and none is the default; or one draws at random.
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
    if drawn := DRAWS.search(text):
        what = f"its chat template draws at random ({drawn[0]}): each reading of a row would be another one"
        raise UserError(what, remedy="write one of the choices into the template, or set base.chat_template: turns")
    if "strftime_now" in text:
        text = _clock(text) + text
        notes.append(f"the chat template asks for the date: pinned, it says {DATE:%d %B %Y} for good")
    if not _shows(tokenizer, text) and _shows(tokenizer, PARTS + text):
        text = PARTS + text
        notes.append("the chat template takes contents in parts: pinned, it takes texts as well")
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


def problems(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Messages] = ()) -> list[UserError]:
    """What is wrong with a tokenizer's chat template.

    Args:
        dialogues: that it is to render besides some small ones, for example a sample of the data; of each kind of fault the first is told.
    """
    for messages in TRIED:
        if error := _problem(tokenizer, messages):
            return [error]
    found: dict[str, UserError] = {}
    for messages in dialogues:
        if error := _problem(tokenizer, messages):
            found.setdefault(error.what.rpartition(": ")[2], error)
    return list(found.values())


def _problem(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> UserError | None:
    what = examples.problem(tokenizer, messages)
    if not what and messages[-1] == ANSWER:
        ids, mask = encode_dialogue(tokenizer, messages)
        learnt = tokenizer.decode([i for i, counted in zip(ids, mask, strict=True) if counted])
        what = None if ANSWER["content"] in learnt else "the chat template leaves out what assistant says"
    return UserError(what, remedy=MEND) if what else None
