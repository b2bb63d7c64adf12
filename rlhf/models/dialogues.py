"""From dialogues and passages to token ids, and from the ids of an answer back to its text.

One encoding for all stages: a dialogue is cut where the chat template starts and ends an assistant turn, and each piece is tokenized
without those that follow. So the tokens that sft trains on, that the reward model reads and that PPO samples are the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError, first_line
from rlhf.models.contents import Controls, controls, encode_passages

Messages = Sequence[Mapping[str, Any]]  # role, content, …: as rlhf.data.turns makes them
Frozen = tuple[str, ...]  # messages that can be looked up, each as JSON
Encoded = tuple[list[int], list[int]]  # token ids and mask
MEND = "set base.chat_template: turns, which takes any dialogue, mend the model's chat template, or take such rows out of the data"


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Encoded:
    """Token ids of a dialogue and a mask of the same length: 1 on each assistant turn's tokens, its end token included.

    A turn of weight 0 is not counted. What the template writes after the last end token is left out. A dialogue that ends in a user turn
    ends with the generation prompt.
    """
    return encode_dialogues(tokenizer, [messages])[0]


def encode_dialogues(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Messages]) -> list[Encoded]:
    """What `encode_dialogue` makes of each: every distinct text is rendered and tokenized once, and all of them in one call.

    Raises:
        UserError: the chat template does not take one of them, or the tokenizer does not take a content as text.
    """
    words = controls(tokenizer)
    given = [[words.marked_turn(message) for message in messages] for messages in dialogues]
    frozen = [tuple(json.dumps(message, ensure_ascii=False) for message in messages) for messages in given]
    answers = [[i for i, message in enumerate(messages) if message["role"] == "assistant"] for messages in given]
    before = _render(tokenizer, _before_answers(frozen, answers), answer_follows=True)
    after = _render(tokenizer, [key[: i + 1] for key, places in zip(frozen, answers, strict=True) for i in places], answer_follows=False)
    end = str(tokenizer.eos_token)
    cut = [_pieces(*dialogue, before, after, end) for dialogue in zip(given, frozen, answers, strict=True)]
    tokens = _tokens(words, [[text for text, _ in pieces] for pieces in cut])
    return [
        (
            [token for ids in found for token in ids],
            [counted for (_, counted), ids in zip(pieces, found, strict=True) for _ in ids],
        )
        for pieces, found in zip(cut, tokens, strict=True)
    ]


def _tokens(words: Controls, dialogues: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Token ids of each piece of each dialogue, as the tokenizer writes it behind the piece before.

    Where it puts the end of one and the beginning of the next into one token, the next is written for itself: a prompt stays as it is,
    whatever is answered.
    """
    behind = [_with_before(pieces) if words.marks_beginnings else [("", piece) for piece in pieces] for pieces in dialogues]
    texts = list(dict.fromkeys(text for pairs in behind for before, piece in pairs for text in (before, piece, before + piece)))
    ids = dict(zip(texts, words.encode(texts), strict=True))

    def written(before: str, piece: str) -> list[int]:
        known, both = ids[before], ids[before + piece]
        return both[len(known) :] if both[: len(known)] == known else ids[piece]

    return [[written(*pair) for pair in pairs] for pairs in behind]


def _with_before(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Each piece, and the last one before it that is not empty."""
    found, before = [], ""
    for piece in pieces:
        found.append((before, piece))
        before = piece or before
    return found


def _before_answers(dialogues: Iterable[Frozen], answers: Iterable[Sequence[int]]) -> list[Frozen]:
    """What stands before each answer: the whole of a dialogue that ends in a user turn, too."""
    found = []
    for messages, places in zip(dialogues, answers, strict=True):
        found += [messages[:i] for i in places]
        if len(messages) - 1 not in places:
            found.append(messages)
    return found


def _render(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Frozen], *, answer_follows: bool) -> dict[Frozen, str]:
    return {key: render(tokenizer, [json.loads(turn) for turn in key], answer_follows=answer_follows) for key in dict.fromkeys(dialogues)}


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, answer_follows: bool) -> str:
    """A dialogue as its chat template writes it.

    Raises:
        UserError: the chat template has a slip, or refuses the dialogue.
    """
    tools = next((message["tools"] for message in messages if "tools" in message), None)
    plain = [{name: value for name, value in message.items() if name not in ("tools", "weight")} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=answer_follows))
    except TemplateSyntaxError as error:
        what = f"has a slip in line {error.lineno}: {error.message}"
    except Exception as error:  # what the template raises, or stumbles over
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        what = f"refuses a dialogue of {roles}: {first_line(error)}"
    raise UserError(f"the chat template {what}", remedy=MEND)


def _pieces(
    given: Messages,
    messages: Frozen,
    answers: Sequence[int],
    rendered_before: dict[Frozen, str],
    rendered_after: dict[Frozen, str],
    end: str,
) -> list[tuple[str, int]]:
    """The text of a dialogue, cut where answers begin and end; each piece with its mask."""
    pieces: list[tuple[str, int]] = []
    done = ""
    for i in answers:
        before, after = rendered_before[messages[:i]], rendered_after[messages[: i + 1]]
        if not (before.startswith(done) and after.startswith(before)):
            # a template that rewrites earlier turns: only the last answer can be learnt as it will be sampled
            pieces, done = [], ""
        answer = after[len(before) :] if after.startswith(before) else _bare(given[i]) + end
        if end not in answer:
            raise UserError(f"the chat template writes no end token ({end}) after an answer: {answer[-60:]!r}", remedy=MEND)
        answer = answer[: answer.index(end) + len(end)]  # the first: there sampling ends, whatever the template writes behind it (Phi 3)
        pieces += [(before[len(done) :], 0), (answer, int(given[i].get("weight") != 0))]
        done = before + answer
    if len(messages) - 1 not in answers:
        whole = rendered_before[messages]
        if not whole.startswith(done):
            pieces, done = [], ""
        pieces.append((whole[len(done) :], 0))
    return pieces


def _bare(answer: Mapping[str, Any]) -> str:
    """The text of an answer that the template writes otherwise than it asks for one."""
    if more := sorted(answer.keys() - {"role", "content", "weight", "tools"}):
        what = f"the chat template does not begin an answer as it asks for one, so that its {more[0]} cannot be learnt"
        raise UserError(what, remedy=MEND)
    return str(answer["content"])


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
    for ids in encode_passages(tokenizer, texts):
        stream += [*ids, tokenizer.eos_token_id]
    return [stream[i : i + width] for i in range(0, len(stream) - width + 1, width)]
