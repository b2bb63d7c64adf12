"""Contents that hold the words of control tokens, such as `<|im_end|>`: they are text, so that none of them ends a turn or begins one.

Before a chat template writes a dialogue, such words get a mark inside, which tells them from those that the template writes. What then has
a mark is tokenized by a copy of the tokenizer in which the control tokens have other names; everything else by the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import UserError

MARK, RENAMED = "\ufdd0", "\ufdd1"  # of no character: Unicode keeps them for such use
TRIED = ({"role": "system", "content": "A"}, {"role": "user", "content": "B"}, {"role": "assistant", "content": "C"})


class Controls:
    """The control tokens of a tokenizer: the special ones, and of its other added tokens those that the chat template puts around turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        written = _written(tokenizer, TRIED[1:]) + _written(tokenizer, TRIED)
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        # a word of letters, as the name of a role, is one of ordinary contents too
        found = special | {str(token) for token in added if str(token) in written and not str(token).isalnum()}
        self.words = {word for word in found if len(word) > 1 and not word.isspace()}
        # of several that begin alike the longest
        longest_first = sorted(self.words, key=lambda word: (-len(word), word))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def within(self, value: Any) -> list[str]:
        """The words of control tokens in the texts of a value, which has the types of JSON."""
        return self._pattern.findall(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    def marked(self, value: Any) -> Any:
        """The same value, with a mark in each word of a control token."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self.marked(name): self.marked(inner) for name, inner in value.items()}
        return [self.marked(inner) for inner in value] if isinstance(value, list | tuple) else value

    def marked_turn(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value if name == "role" else self.marked(value) for name, value in message.items()}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, those with a mark among them.

        Raises:
            UserError: the tokenizer cannot take the words of a control token as text.
        """
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for place, text in enumerate(texts):
            if MARK in text:
                ids[place] = self._as_text(text)
        return ids

    def _as_text(self, text: str) -> list[int]:
        renamed, written = self._pattern.subn(lambda found: RENAMED + found[0], text)
        ids: list[int] = self._copy.encode(renamed.replace(MARK, ""), add_special_tokens=False).ids if self._copy else []
        if sum(number in self._numbers for number in ids) != written:
            what = f"its tokenizer cannot take {self.within(text.replace(MARK, ''))[0]!r} in a content as text, but only as a control token"
            raise UserError(
                what, remedy="take such rows out of the data, or give the model with a tokenizer.json in which no name is normalised"
            )
        return ids

    @cached_property
    def marks_beginnings(self) -> bool:
        """Whether the tokenizer begins a text otherwise than what stands within one, as with a mark of a space (Llama 2's, Mistral's)."""
        first, second, both = self._tokenizer(["\n", "B", "\nB"], add_special_tokens=False)["input_ids"]
        return bool(first + second != both)

    @cached_property
    def _numbers(self) -> set[int]:
        words = self.words - {str(self._tokenizer.unk_token)}  # what stands for unknown characters
        return {number for word, number in self._tokenizer.get_vocab().items() if word in words}

    @cached_property
    def _copy(self) -> Tokenizer | None:
        """The tokenizer with other names for control tokens; None for one that the `tokenizers` library did not make."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            return None
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        model = content["model"]
        for token in content["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(word): number for word, number in model["vocab"].items()}
        else:
            model["vocab"] = [[self._renamed(word), score] for word, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._renamed(model["unk_token"])
        if "merges" in model:
            parts = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            model["merges"] = [part for part in parts if "".join(part) not in self.words]
        return Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None, "post_processor": None}))

    def _renamed(self, word: str) -> str:
        return RENAMED + word if word in self.words else word


def controls(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The control tokens of a tokenizer as it is now."""
    return _controls(tokenizer, str(tokenizer.chat_template), str(tokenizer.eos_token), len(tokenizer))


@lru_cache(maxsize=4)
def _controls(tokenizer: PreTrainedTokenizerBase, *_: object) -> Controls:
    return Controls(tokenizer)


def _written(tokenizer: PreTrainedTokenizerBase, dialogue: Sequence[dict[str, str]]) -> str:
    """What the chat template writes of a dialogue and a further question: earlier answers have no marks of thoughts."""
    try:
        return str(tokenizer.apply_chat_template([*dialogue, TRIED[1]], tokenize=False))
    except Exception:  # the template may refuse it, or there may be none
        return ""


def encode_passages(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which nothing is a control token, but for that which the tokenizer begins a text with, if it does."""
    found = controls(tokenizer)
    begin = beginning(tokenizer)
    return [begin + ids for ids in found.encode([found.marked(text) for text in texts])]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a tokenizer puts before a text (Llama 3's, Gemma's): without it such a model computes on what it has never seen.

    In dialogues it is the template that writes it.
    """
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
