"""What a row must hold to be used. A row that fails goes to quarantine with the reason given here."""

from __future__ import annotations

import hashlib
import marshal
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from rlhf.data.fields import Turns
from rlhf.data.formats import Quarantined, Row

_PLACE = struct.Struct("<IQ?")  # number of the file, line, whether the row is swapped


class Checker:
    """Checks rows one after another; knows all earlier ones, of every source, so that it sees repetitions."""

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters
        self._files: dict[tuple[str, str], int] = {}  # source and name: number
        self._seen: dict[bytes, bytes] = {}  # where the first such row is: there may be many millions

    def divide(self, rows: Iterable[Row | Quarantined]) -> tuple[list[Row], list[Quarantined]]:
        """The rows to use, and those to keep in quarantine."""
        good: list[Row] = []
        bad: list[Quarantined] = []
        for row in self.checked(rows):
            if isinstance(row, Quarantined):
                bad.append(row)
            else:
                good.append(row)
        return good, bad

    def checked(self, rows: Iterable[Row | Quarantined]) -> Iterator[Row | Quarantined]:
        """Each row, in quarantine if it cannot be used."""
        for row in rows:
            reason = None if isinstance(row, Quarantined) else self.problem(row)
            yield Quarantined(row.source, row.file, row.line, reason, row.content) if isinstance(row, Row) and reason else row

    def problem(self, row: Row) -> str | None:
        """Why the row cannot be used, or None."""
        return text_problem(row, self.max_characters) or self._repetition(row)

    def _repetition(self, row: Row) -> str | None:
        digest, swapped = identity(row)
        if earlier := self._seen.get(digest):
            number, line, was_swapped = _PLACE.unpack(earlier)
            source, file = list(self._files)[number]
            return repetition(was_swapped == swapped, source == row.source, place_of(line, file))
        number = self._files.setdefault((row.source, row.file), len(self._files))
        self._seen[digest] = _PLACE.pack(number, row.line, swapped)
        return None


def text_problem(row: Row, max_characters: int) -> str | None:
    """Why the row by itself cannot be used, or None."""
    texts = {"text": row.text, "chosen": row.chosen, "rejected": row.rejected}
    for name, text in texts.items():
        if text is not None and not text.strip() and not (name == "chosen" and row.beside and "tool_calls" in row.beside):
            return f"empty: {name}"
    if row.kind != "text" and (reason := turns_problem(row.prompt)):
        return reason
    if row.chosen is not None and row.chosen == row.rejected:
        return "chosen equals rejected"
    longest = sum(len(turn["content"]) for turn in row.prompt) + max(len(text or "") for text in texts.values())
    return f"over-long: {longest} characters, at most {max_characters}" if longest > max_characters else None


_NEXT = {"user": ("assistant",), "assistant": ("user",), "call": ("tool",), "tool": ("assistant", "tool")}


def turns_problem(prompt: Turns) -> str | None:
    """Why these turns cannot stand before an answer, or None.

    Right is: a system turn or none, then user and assistant in alternation, a user turn last. Where the assistant calls tools, their turns
    follow, and then its own.
    """
    expected: tuple[str, ...] = ("user",)
    for number, turn in enumerate(prompt, start=1):
        role, calls = turn["role"], "tool_calls" in turn
        if role not in ("system", "user", "assistant", "tool"):
            return f"malformed: turn {number} has role '{role}', not system, user, assistant or tool"
        if not turn["content"].strip() and not calls:
            return f"empty: turn {number} ({role})"
        if role == "system" and number == 1:
            continue
        if role not in expected:
            return f"malformed: turn {number} is of role '{role}' where '{expected[0]}' must stand"
        expected = _NEXT["call" if calls else role]
    return None if prompt and "assistant" in expected else "malformed: no user turn before the answer"


# --------------------------------------------------------------------------------------------------------- repetitions


def identity(row: Row) -> tuple[bytes, bool]:
    """A digest that the row shares with its repetitions and with pairs that say the opposite; and whether the row is the swapped one.

    So the first row of a digest is used, and each later one repeats it, where both are swapped or neither is, or contradicts it.
    """
    swapped = row.rejected is not None and (row.chosen or "") > row.rejected
    answers = (row.rejected, row.chosen) if swapped else (row.chosen, row.rejected)
    return digest_of((row.kind, row.content | dict(zip(("chosen", "rejected"), answers, strict=True)))), swapped


def key_of(row: Row) -> tuple[str, ...]:
    """What must not stand both in training and in the held-out rows: the prompt, or the passage."""
    if row.text is not None:
        return (row.text.strip(),)
    return key_of_prompt(row.prompt)


def key_of_prompt(prompt: Turns) -> tuple[str, ...]:
    """The same of a row that is no passage."""
    return tuple(part for turn in prompt for part in (turn["role"], turn["content"].strip()))


def digest_of(value: Any) -> bytes:
    """Of a value that has the types of JSON, and tuples."""
    # of version 2, the last in which the same value always has the same bytes
    return hashlib.blake2b(marshal.dumps(value, 2), digest_size=16).digest()


def repetition(same: bool, same_source: bool, place: str) -> str:
    """The reason for quarantine.

    Args:
        same: as the earlier row; else its opposite.
        place: of the earlier row.
    """
    if not same:
        return f"contradiction: prefers the opposite of {place}"
    return f"{'duplicate' if same_source else 'in another source'}: same as {place}"


def place_of(line: int, file: str) -> str:
    return f"line {line} of {file}"
