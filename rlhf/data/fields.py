"""Values out of a record, checked: what is not there or not right raises `BadRow`, whose message is the reason for quarantine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

Record = Mapping[str, Any]
Turn = dict[str, Any]  # role, content; where given: weight (0: not to be learnt), tool_calls, …; the first one may hold tools
Turns = tuple[Turn, ...]
Fields = dict[str, Any]  # of a row: prompt, chosen, rejected, text, …
DEEPEST = 200  # objects and lists in each other: what sends a row to another process, and what writes it, has limits not far above


@dataclass(frozen=True)
class Unreadable:
    """What stands where an object should stand."""

    reason: str
    raw: str


Records = Iterable[tuple[int, Record | Unreadable]]  # each with its line or number, from 1
# bytes: a line of JSON; whoever takes the records need not parse it itself
Unparsed = Iterable[tuple[int, Record | Unreadable | bytes]]


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
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise BadRow(f"malformed: '{column}' is {record[column]!r}, not a number")
    return value


def check_texts(value: Any, levels: int = DEEPEST) -> None:
    """Check that UTF-8 can say every text in a value, which has the types of JSON."""
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value)
    elif isinstance(value, Mapping | list | tuple):
        if not levels:
            raise BadRow("malformed: nested too deeply")
        for inner in chain.from_iterable(value.items()) if isinstance(value, Mapping) else value:
            check_texts(inner, levels - 1)


def _check_text(text: str) -> None:
    # files are decoded with surrogateescape and JSON may hold "\ud800": a lone surrogate is what UTF-8 cannot say
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        raise BadRow(f"not UTF-8: {what}") from None


def name_of(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))
