"""Tokens to text as they come: whole characters, and nothing of a text to stop at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST = 8  # tokens that are held back for a character that never becomes whole
UNKNOWN = "\ufffd"  # what a part of a character is read as


class Text:
    """The text of one answer in the making.

    Args:
        tokenizer: transformers' one.
        stops: texts that the answer ends before.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        # the library beneath transformers takes a fifth of the time, at each token of each answer
        self._decode = getattr(tokenizer, "backend_tokenizer", tokenizer).decode
        self._stops = [stop for stop in stops if stop]
        self._window: list[int] = []  # the last tokens; some tokenizers write a token otherwise at the beginning of a text
        self._read = 0  # tokens of the window whose text is out
        self._known = ""  # their text
        self._held = ""
        self.length = 0  # characters that are certain, as no token changes them any more, held ones included
        self._before = 0  # those of them that stand before the unread tokens of the window
        self.out = 0  # characters that were given away
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token; what may become a text to stop at is held back."""
        self._window.append(token)
        now = self._decode(self._window, skip_special_tokens=True)
        if now.endswith(UNKNOWN) and len(self._window) - self._read < LONGEST:
            self.length = self._before + len(now[len(self._known) :].rstrip(UNKNOWN))
            return ""
        return self._found(now)

    def end(self) -> str:
        """What was held back, once no token follows."""
        found = "" if self.stopped else self._found(self._decode(self._window, skip_special_tokens=True))
        rest, self._held = self._held, ""
        self.out += len(rest)
        return found + rest

    def _found(self, now: str) -> str:
        new = now[len(self._known) :]
        self.length = self._before = self._before + len(new)
        # the tokens before the last ones have no say any more
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._known = self._decode(self._window, skip_special_tokens=True)
        self._held += new
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(places)
        clear = min(places) if places else self._certain()
        found, self._held = self._held[:clear], "" if self.stopped else self._held[clear:]
        self.out += len(found)
        return found

    def _certain(self) -> int:
        """Characters that cannot be the beginning of a text to stop at."""
        longest = max(map(len, self._stops), default=1) - 1
        first = max(0, len(self._held) - longest)
        begun = (place for place in range(first, len(self._held)) if any(stop.startswith(self._held[place:]) for stop in self._stops))
        return next(begun, len(self._held))
