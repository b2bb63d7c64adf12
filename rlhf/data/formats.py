"""Readers: every format of every kind of file becomes one `Row` per line, or a `Quarantined` that says what is wrong with it.

A bad row never stops the reading; a file that cannot be read at all does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.data import Columns, FileSource, Source
from rlhf.data.records import Unreadable, records_of
from rlhf.data.sandbox import make_rows
from rlhf.errors import UserError

Turns = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Row:
    """One row of a source. A dialogue is its prompt, ending in a user turn, and the answers to it; a text row has only its text."""

    source: str
    file: str
    line: int
    kind: str
    prompt: Turns = ()
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    gold: dict[str, Any] | None = None

    @property
    def content(self) -> dict[str, Any]:
        """What makes the row the same as another one."""
        fields = {"prompt": self.prompt or None, "chosen": self.chosen, "rejected": self.rejected, "text": self.text}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Quarantined:
    """A row that no stage may see. The reason is a category, where useful followed by a colon and details."""

    source: str
    file: str
    line: int
    reason: str
    row: Any

    @property
    def category(self) -> str:
        return self.reason.partition(":")[0]


class _BadRow(Exception):  # noqa: N818 - not an error of the program: its message is the reason for quarantine
    pass


# ------------------------------------------------------------------------------------------------------------- sources

_SANDBOX_COLUMNS = Columns(
    prompt="prompt", chosen="chosen", rejected="rejected", messages="messages", question="question", answer="answer", text="text"
)


def read(source: Source, key: str, root: Path, seed: int) -> Iterator[Row | Quarantined]:
    """The rows of a source, in order, good and bad.

    Args:
        source: an entry of data.sources.
        key: where it stands in params.yaml, for example ``data.sources.0``.
        root: what a relative path starts from.
        seed: of a sandbox source's rows.

    Raises:
        UserError: the file or hub dataset cannot be read, holds no rows, or a column is missing from every row.
    """
    form: str = source.kind
    if isinstance(source, FileSource):
        file, form, columns = source.path or f"{source.hub}@{source.revision}", source.format, source.columns
        records = records_of(source, key, root)
    else:
        file, columns = "sandbox", _SANDBOX_COLUMNS
        records = enumerate(make_rows(source.kind, source.rows, seed, source.label_noise), start=1)
    names, parse = _FORMATS[form]
    needed = {name: getattr(columns, name) for name in names if getattr(columns, name) is not None}
    read_count, missing, present = 0, Counter[str](), dict[str, None]()
    for line, record in records:
        read_count += 1
        raw = record.raw if isinstance(record, Unreadable) else record
        try:
            _check_utf8(raw)
            if isinstance(record, Unreadable):
                raise _BadRow(record.reason)
            present.update(dict.fromkeys(record))
            absent = [name for name, column in needed.items() if column not in record]
            missing.update(absent)
            if absent:
                raise _BadRow(f"malformed: no column '{needed[absent[0]]}'")
            gold = None if isinstance(source, FileSource) else record.get("gold")
            yield Row(source.name, file, line, source.kind, gold=gold, **parse(record, columns))
        except _BadRow as reason:
            yield Quarantined(source.name, file, line, str(reason), raw)
    if not read_count:
        raise UserError(f"{key}: {file} holds no rows", remedy="give a file with rows, or take the source out of params.yaml")
    for name, count in missing.items():
        if count == read_count:
            raise UserError(
                f"{key}: no row of {file} has a column '{needed[name]}'; its columns are {', '.join(map(repr, present))}",
                remedy=f"set {key}.columns.{name} in params.yaml, or another format",
            )


def _check_utf8(raw: Any) -> None:
    # files are decoded with surrogateescape and JSON may hold "\ud800": a lone surrogate is what UTF-8 cannot say
    try:
        json.dumps(raw, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        raise _BadRow(f"not UTF-8: {what}") from None


# ------------------------------------------------------------------------------------------------------------- formats


def _string(record: Mapping[str, Any], column: str) -> str:
    value = record[column]
    if value is None:
        raise _BadRow(f"empty: '{column}' is null")
    if not isinstance(value, str):
        raise _BadRow(f"malformed: '{column}' is of type {type(value).__name__}, not text")
    return value


def _turns(record: Mapping[str, Any], column: str) -> Turns:
    """A dialogue: a message list, or Anthropic's text."""
    value = record[column]
    if not isinstance(value, list):
        return _hh_turns(_string(record, column), column)
    for number, turn in enumerate(value, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise _BadRow(f"malformed: turn {number} of '{column}' is not an object with role and content as text")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def _hh_turns(text: str, column: str) -> Turns:
    start, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    if start.strip():
        raise _BadRow(f"malformed: '{column}' does not begin with 'Human:' or 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True))


def _dialogue(record: Mapping[str, Any], column: str) -> tuple[Turns, str]:
    """The turns before the last answer, and that answer."""
    turns = _turns(record, column)
    if not turns:
        raise _BadRow(f"empty: '{column}' has no turns")
    if turns[-1]["role"] != "assistant":
        raise _BadRow(f"no assistant turn: '{column}' ends in a turn of role '{turns[-1]['role']}'")
    return turns[:-1], turns[-1]["content"].strip()


def _side(record: Mapping[str, Any], column: str, prompt: Turns | None) -> tuple[Turns, str]:
    if prompt is None:
        return _dialogue(record, column)
    if isinstance(record[column], str):
        return prompt, record[column].strip()
    before, answer = _dialogue(record, column)
    if before not in ((), prompt):
        raise _BadRow(f"malformed: '{column}' is a dialogue that does not begin with the prompt")
    return prompt, answer


def _pair(record: Mapping[str, Any], columns: Columns, prompt_column: str | None) -> dict[str, Any]:
    prompt = None if prompt_column is None else _prompt(record, prompt_column)
    before, chosen = _side(record, columns.chosen, prompt)
    before_rejected, rejected = _side(record, columns.rejected, prompt)
    if before != before_rejected:
        raise _BadRow("malformed: chosen and rejected differ before the last answer")
    return {"prompt": before, "chosen": chosen, "rejected": rejected}


def _prompt(record: Mapping[str, Any], column: str) -> Turns:
    return _turns(record, column) if isinstance(record[column], list) else _asks(_string(record, column))


def _asks(question: str) -> Turns:
    return ({"role": "user", "content": question},)


def _messages(record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    prompt, answer = _dialogue(record, columns.messages)
    return {"prompt": prompt, "chosen": answer}


# name: the columns that it reads, and how
_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], Columns], dict[str, Any]]]] = {
    "hh": (("chosen", "rejected"), lambda record, columns: _pair(record, columns, None)),
    "pairs": (("prompt", "chosen", "rejected"), lambda record, columns: _pair(record, columns, columns.prompt)),
    "messages": (("messages",), _messages),
    "qa": (
        ("question", "answer"),
        lambda record, columns: {"prompt": _asks(_string(record, columns.question)), "chosen": _string(record, columns.answer).strip()},
    ),
    "prompts": (("prompt",), lambda record, columns: {"prompt": _turns(record, columns.prompt or "prompt")}),
    "text": (("text",), lambda record, columns: {"text": _string(record, columns.text)}),
}
