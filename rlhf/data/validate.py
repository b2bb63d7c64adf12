"""What a row must hold to be used. A row that fails goes to quarantine with the reason given here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace

from rlhf.data.fields import Turns
from rlhf.data.formats import Quarantined, Row


class Checker:
    """Checks rows one after another; knows all earlier ones, of every source, so that it sees repetitions."""

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters
        self._seen: dict[bytes, tuple[str, str]] = {}  # source and place of the first such row

    def divide(self, rows: Iterable[Row | Quarantined]) -> tuple[list[Row], list[Quarantined]]:
        """The rows to use, and those to keep in quarantine."""
        good: list[Row] = []
        bad: list[Quarantined] = []
        for row in rows:
            if isinstance(row, Quarantined):
                bad.append(row)
            elif reason := self.problem(row):
                bad.append(Quarantined(row.source, row.file, row.line, reason, row.content))
            else:
                good.append(row)
        return good, bad

    def problem(self, row: Row) -> str | None:
        """Why the row cannot be used, or None."""
        return self._text_problem(row) or self._repetition(row)

    def _text_problem(self, row: Row) -> str | None:
        texts = {"text": row.text, "chosen": row.chosen, "rejected": row.rejected}
        for name, text in texts.items():
            if text is not None and not text.strip() and not (name == "chosen" and row.beside and "tool_calls" in row.beside):
                return f"empty: {name}"
        if row.kind != "text" and (reason := turns_problem(row.prompt)):
            return reason
        if row.chosen is not None and row.chosen == row.rejected:
            return "chosen equals rejected"
        longest = sum(len(turn["content"]) for turn in row.prompt) + max(len(text or "") for text in texts.values())
        return f"over-long: {longest} characters, at most {self.max_characters}" if longest > self.max_characters else None

    def _repetition(self, row: Row) -> str | None:
        digest = _digest(row)
        if earlier := self._seen.get(digest):
            return f"{'duplicate' if earlier[0] == row.source else 'in another source'}: same as {earlier[1]}"
        if row.rejected is not None and (earlier := self._seen.get(_digest(replace(row, chosen=row.rejected, rejected=row.chosen)))):
            return f"contradiction: prefers the opposite of {earlier[1]}"
        self._seen[digest] = row.source, f"line {row.line} of {row.file}"
        return None


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


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(json.dumps([row.kind, row.content], ensure_ascii=False).encode(), digest_size=16).digest()
