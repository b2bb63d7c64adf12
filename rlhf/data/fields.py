"""Values out of a record, checked: what is not there or not right raises `BadRow`, whose message is the reason for quarantine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Turns = tuple[dict[str, str], ...]
Fields = dict[str, Any]  # prompt, chosen, rejected or text of a row


class BadRow(Exception):  # noqa: N818 - not an error of the program: its message is the reason for quarantine
    pass


def value_at(record: Record, *path: str | int) -> Any:
    """What stands at a path of keys and places in lists, for example ``("answers", "ja", 0, "text")``."""
    value: Any = record
    for depth, part in enumerate(path, start=1):
        there = isinstance(value, list) and part < len(value) if isinstance(part, int) else isinstance(value, Mapping) and part in value
        if not there:
            raise BadRow(f"malformed: no '{name_of(path[:depth])}'")
        value = value[part]
    return value


def string(record: Record, *path: str | int) -> str:
    value = value_at(record, *path)
    if value is None:
        raise BadRow(f"empty: '{name_of(path)}' is null")
    if not isinstance(value, str):
        raise BadRow(f"malformed: '{name_of(path)}' is of type {type(value).__name__}, not text")
    return value


def number(record: Record, column: str) -> float:
    try:
        value = float(record[column])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise BadRow(f"malformed: '{column}' is {record[column]!r}, not a number")
    return value


def name_of(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


# ------------------------------------------------------------------------------------------------------------- dialogues


def asks(question: str) -> Turns:
    return ({"role": "user", "content": question},)


def turns(record: Record, column: str) -> Turns:
    """A dialogue: a message list, or Anthropic's text."""
    value = record[column]
    if not isinstance(value, list):
        return marked_turns(string(record, column), column)
    return keyed_turns(value, column, "role", "content", {})


def keyed_turns(value: Any, column: str, role: str, content: str, names: Mapping[str, str]) -> Turns:
    """A list of objects, one a turn.

    Args:
        role, content: the keys of an object that say who speaks, and what.
        names: what the dataset calls a role → the role; others stay as they are.
    """
    if not isinstance(value, list):
        raise BadRow(f"malformed: '{column}' is of type {type(value).__name__}, not a list of turns")
    for place, turn in enumerate(value, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get(role), str) and isinstance(turn.get(content), str)):
            raise BadRow(f"malformed: turn {place} of '{column}' is not an object with {role} and {content} as text")
    return tuple({"role": names.get(turn[role], turn[role]), "content": turn[content]} for turn in value)


def marked_turns(text: str, column: str) -> Turns:
    """Anthropic's form: each turn begins with an empty line and ``Human:`` or ``Assistant:``."""
    start, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    if start.strip():
        raise BadRow(f"malformed: '{column}' does not begin with 'Human:' or 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True))


def last_answer(dialogue: Turns, column: str) -> tuple[Turns, str]:
    """The turns before the last answer, and that answer."""
    if not dialogue:
        raise BadRow(f"empty: '{column}' has no turns")
    if dialogue[-1]["role"] != "assistant":
        raise BadRow(f"no assistant turn: '{column}' ends in a turn of role '{dialogue[-1]['role']}'")
    return dialogue[:-1], dialogue[-1]["content"].strip()
