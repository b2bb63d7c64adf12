"""JSON files: a line for each object, a list, or objects one after the other; what stands there is never guessed at."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from rlhf.data.fields import Records, Unparsed, Unreadable

CHUNK = 1 << 20
_SPACE = re.compile(r"\s*")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{twice}' stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def of_lines(file: Iterable[bytes]) -> Unparsed:
    """JSON lines as they are, by number of the line."""
    yield from enumerate(file, start=1)


def parsed(records: Unparsed) -> Records:
    """The objects of records, those of lines among them."""
    for number, record in records:
        found = of_line(record) if isinstance(record, bytes) else record
        if found is not None:
            yield number, found


def of_line(line: bytes) -> Mapping[str, Any] | Unreadable | None:
    """What a line holds; None: nothing."""
    text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip()
    if not text:
        return None
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"malformed: not JSON ({error})", text)
    return value if isinstance(value, dict) else Unreadable("malformed: not a JSON object", text)


def of_document(file: IO[bytes]) -> Records:
    """The objects of a list, of an object ``{"data": list}``, or one after the other, each over as many lines as it likes.

    Raises:
        ValueError: it is damaged, or something else.
    """
    text = _Text(file)
    rows: Iterable[Any] = _elements(text) if text.next() == "[" else _objects(text)
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else Unreadable("malformed: not a JSON object", json.dumps(row))


def of_document_or_lines(file: IO[bytes]) -> Unparsed:
    """A document; lines, if as a whole it is none."""
    content = file.read()
    try:
        yield from list(of_document(io.BytesIO(content)))
    except (ValueError, RecursionError):
        yield from of_lines(io.BytesIO(content))


class _Text:
    """The text of a file, as far as it is needed: a list of many GB is never in memory whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self._text, self._place, self._whole = "", 0, False

    def next(self) -> str:
        """The next character that is no space, which is not taken; nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._place)
            self._place = found.end() if found else self._place
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def take(self, character: str) -> None:
        if self.next() != character:
            raise ValueError(f"{self.next()!r} stands where {character!r} must stand" if self.next() else "it ends in the middle")
        self._place += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except ValueError:
                if not self._more():
                    raise
            else:
                self._place = end
                return value

    def _more(self) -> bool:
        """Read on, twice as much each time that it does not suffice."""
        if self._whole:
            return False
        content = self._file.read(max(CHUNK, len(self._text) - self._place))
        self._whole = not content
        self._text, self._place = self._text[self._place :] + self._decode(content, final=self._whole), 0
        return True


def _elements(text: _Text) -> Iterator[Any]:
    text.take("[")
    number = 0
    while text.next() != "]":
        number += 1
        try:
            yield text.value()
            if text.next() != "]":
                text.take(",")
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    text.take("]")
    if text.next():
        raise ValueError("more stands behind its list")


def _objects(text: _Text) -> list[Any]:
    values = []
    while text.next():
        values.append(text.value())
    if len(values) == 1 and isinstance(values[0], dict) and "data" not in values[0]:
        _check_row(values[0])
    rows = values[0].get("data", values) if len(values) == 1 and isinstance(values[0], dict) else values
    if not isinstance(rows, list):
        raise ValueError('it holds neither a list nor an object {"data": [...]}')
    return rows


def _check_row(value: Mapping[str, Any]) -> None:
    """Check that an object that stands alone in its file is a row, and not a table by columns.

    Raises:
        ValueError: it is one.
    """
    columns = list(value.values())
    by_number = all(isinstance(column, dict) and all(map(str.isdecimal, column)) for column in columns)
    lists = all(isinstance(column, list) and not any(isinstance(cell, dict) for cell in column) for column in columns)
    if len(columns) > 1 and (by_number or lists) and len({len(column) for column in columns}) == 1 and len(columns[0]) > 1:
        raise ValueError("it holds columns and not rows: write it with pandas' to_json(orient='records', lines=True)")
