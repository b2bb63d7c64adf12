"""From dialogues and passages to token ids, and from the ids of an answer back to its text.

One encoding for all stages: a dialogue is cut where the chat template starts and ends an assistant turn, and each piece is tokenized for
itself. So the tokens that sft trains on, that the reward model reads and that PPO samples are the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError, first_line

Messages = Sequence[dict[str, str]]
Frozen = tuple[tuple[tuple[str, str], ...], ...]  # messages that can be looked up
Encoded = tuple[list[int], list[int]]  # token ids and mask
MEND = "set base.chat_template: turns, which takes any dialogue, or mend the model's chat template"


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Encoded:
    """Token ids of a dialogue and a mask of the same length: 1 on each assistant turn's tokens, its end token included.

    What the template writes after the last end token is left out. A dialogue that ends in a user turn ends with the generation prompt.
    """
    return encode_dialogues(tokenizer, [messages])[0]


def encode_dialogues(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Messages]) -> list[Encoded]:
    """What `encode_dialogue` makes of each: every distinct text is rendered and tokenized once, and all of them in one call."""
    frozen = [tuple(tuple(message.items()) for message in messages) for messages in dialogues]
    before = _render(tokenizer, [part for messages in frozen for part in _before_answers(messages)], answer_follows=True)
    after = _render(tokenizer, [part for messages in frozen for part in _after_answers(messages)], answer_follows=False)
    end = str(tokenizer.eos_token)
    cut = [_pieces(messages, before, after, end) for messages in frozen]
    texts = list(dict.fromkeys(text for pieces in cut for text, _ in pieces))
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)) if texts else {}
    return [
        ([token for text, _ in pieces for token in ids[text]], [counted for text, counted in pieces for _ in ids[text]]) for pieces in cut
    ]


def _answers(messages: Frozen) -> list[int]:
    return [i for i, message in enumerate(messages) if dict(message)["role"] == "assistant"]


def _before_answers(messages: Frozen) -> list[Frozen]:
    """What stands before each answer: the whole of a dialogue that ends in a user turn, too."""
    answers = _answers(messages)
    return [messages[:i] for i in answers] + ([] if len(messages) - 1 in answers else [messages])


def _after_answers(messages: Frozen) -> list[Frozen]:
    return [messages[: i + 1] for i in _answers(messages)]


def _render(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Frozen], *, answer_follows: bool) -> dict[Frozen, str]:
    distinct = list(dict.fromkeys(dialogues))
    plain = [list(map(dict, messages)) for messages in distinct]
    try:
        texts = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer_follows) if plain else []
    except Exception:  # of one among them, which is named
        texts = [render(tokenizer, messages, answer_follows=answer_follows) for messages in plain]
    return dict(zip(distinct, texts, strict=True))


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, answer_follows: bool) -> str:
    """One dialogue as text.

    Raises:
        UserError: the chat template has a slip, or refuses the dialogue.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_follows))
    except TemplateSyntaxError as error:
        what = f"has a slip in line {error.lineno}: {error.message}"
    except Exception as error:  # what the template raises, or stumbles over
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        what = f"refuses a dialogue of {roles}: {first_line(error)}"
    raise UserError(f"the chat template {what}", remedy=MEND)


def _pieces(messages: Frozen, rendered_before: dict[Frozen, str], rendered_after: dict[Frozen, str], end: str) -> list[tuple[str, int]]:
    """The text of a dialogue, cut where answers begin and end; each piece with its mask."""
    pieces: list[tuple[str, int]] = []
    done = ""
    answers = _answers(messages)
    for i in answers:
        before, after = rendered_before[messages[:i]], rendered_after[messages[: i + 1]]
        if not (before.startswith(done) and after.startswith(before)):
            # a template that rewrites earlier turns: only the last answer can be learnt as it will be sampled
            pieces, done = [], ""
        answer = after[len(before) :] if after.startswith(before) else dict(messages[i])["content"] + end
        if end not in answer:
            raise UserError(f"the chat template writes no end token ({end}) after an answer", remedy=MEND)
        answer = answer[: answer.rindex(end) + len(end)]
        pieces += [(before[len(done) :], 0), (answer, 1)]
        done = before + answer
    if len(messages) - 1 not in answers:
        whole = rendered_before[messages]
        if not whole.startswith(done):
            pieces, done = [], ""
        pieces.append((whole[len(done) :], 0))
    return pieces


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    """Token ids of a dialogue that ends in a user turn, up to where the assistant's answer begins."""
    return encode_dialogue(tokenizer, prompt)[0]


def short_enough(tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Those rows whose `prompt` has so many tokens at most."""
    return [row for row in rows if len(encode_prompt(tokenizer, row["prompt"])) <= tokens]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, width: int) -> list[list[int]]:
    """Passages one after the other, each with its end token, cut into rows of one width. What is left over at the end is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return [stream[i : i + width] for i in range(0, len(stream) - width + 1, width)]
