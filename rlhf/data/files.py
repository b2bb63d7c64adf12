"""One data file as numbered objects. What it is, its content says: its name only decides where the content leaves it open."""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from rlhf.data import foreign, jsons
from rlhf.data.fields import Unparsed, Unreadable
from rlhf.errors import UserError

FORMS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst")
ENDINGS = tuple(form + packed for form in FORMS for packed in ("", *PACKED))
KINDS = f"{', '.join(FORMS)}, each also with {', '.join(PACKED)}"


def records_of_file(path: Path, key: str) -> Unparsed:
    """The objects of a file, each with its line (JSON lines, CSV) or its number, from 1. Lines of JSON come as they are.

    What is not valid UTF-8 comes as lone surrogates.

    Raises:
        UserError: there is no such file, or it is damaged or of an unknown kind.
    """
    name = path.name.lower()
    if not name.endswith(ENDINGS):
        if path.is_file():
            _start(path, key)
        as_rows = "; lines of plain text become rows by `jq -cR '{text: .}' FILE > NEW.jsonl`"
        ending = f"ends in '{path.suffix}'" if path.suffix else "has no ending"
        raise UserError(f"{key}.path: {path} {ending}", remedy=f"name it after what it holds: {KINDS}{as_rows}")
    try:
        reader = _reader(path, Path(next(name.removesuffix(ending) for ending in (*PACKED, "") if name.endswith(ending))).suffix, key)
        with _opened(path) as file:
            yield from reader(file)
    except FileNotFoundError:
        raise UserError(f"{key}.path: no such file: {path}", remedy=f"correct {key}.path in params.yaml, or `dvc pull`") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{key}.path: {path} cannot be read: {what}", remedy="mend it, or bring an undamaged copy, with `rlhf use`"
        ) from None


# -------------------------------------------------------------------------------------------------------- what a file is


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return cast(IO[bytes], pyarrow.CompressedInputStream(file, "zstd"))


_UNPACK: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}
_PARQUET, _ARROW = b"PAR1", (b"ARROW1", b"\xff\xff\xff\xff")
_TABLES = (_PARQUET, *_ARROW)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file, unpacked where it begins as a packed one does."""
    with path.open("rb") as plain:
        start = plain.read(6)
        plain.seek(0)
        unpack = next((unpack for magic, unpack in _UNPACK.items() if start.startswith(magic)), None)
        yield plain if unpack is None else io.BufferedReader(unpack(plain), 1 << 16)


def _start(path: Path, key: str) -> bytes:
    with _opened(path) as file:
        start = file.read(jsons.CHUNK)
    if not start.startswith(_TABLES) and (
        other := foreign.kind_of(start, is_text=".parquet" not in path.name and ".arrow" not in path.name)
    ):
        raise UserError(f"{key}.path: {path} is {other[0]}", remedy=other[1])
    return start


def _reader(path: Path, suffix: str, key: str) -> Callable[[IO[bytes]], Unparsed]:
    """What reads a file.

    Raises:
        UserError: it is what often stands in the place of data.
    """
    start = _start(path, key)
    if not start:
        return jsons.of_lines  # there are none, which whoever counts them says
    if start.startswith(_PARQUET) or suffix == ".parquet":
        return _parquet
    if start.startswith(_ARROW) or suffix == ".arrow":
        return _arrow
    if start.lstrip().startswith(b"[") and len(start) == jsons.CHUNK and b"\n" not in start.strip():
        return jsons.of_document  # a list in one line, which need not be read to know it
    with _opened(path) as file:
        return _text_reader(*_first_lines(file), suffix)


def _first_lines(file: IO[bytes]) -> tuple[str, str]:
    """The first two lines that are not empty; an empty text where there are no more."""
    lines = (line.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip() for line in file)
    found = (line for line in lines if line)
    return next(found, ""), next(found, "")


def _text_reader(first: str, second: str, suffix: str) -> Callable[[IO[bytes]], Unparsed]:
    value, table = _value(first), suffix in (".csv", ".tsv")
    opens = first.startswith(("[{", '{"')) or first in ("[", "{")  # JSON, whatever the name is
    if table and not opens:
        given = {".csv": ",", ".tsv": "\t"}[suffix]
        return partial(_csv, delimiter=next((mark for mark in (given, ",", "\t", ";", "|") if mark in first), given))
    if isinstance(value, dict) and (second or suffix in (".jsonl", ".ndjson")):
        return jsons.of_lines
    if isinstance(value, dict | list) and not second:
        return jsons.of_document
    if opens and value is None and (first.endswith(("[", "{")) or not isinstance(_value(second), dict)):
        return jsons.of_document if suffix == ".json" or first.startswith("[") else jsons.of_document_or_lines
    return jsons.of_lines


def _value(text: str) -> Any:
    """What a line holds as JSON; None where it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------------------------------- tables

_OF_TURNS = {"role", "from", "content"}
_TURNS = re.compile(r"""\[\{\s*['"](role|from|content)['"]\s*:""")


def _csv(file: IO[bytes], delimiter: str) -> Unparsed:
    csv.field_size_limit(2**31 - 1)
    taken: list[str] = []
    lines = _noting(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""), taken)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(reader, [])]
    _check_columns(header)
    while True:
        line = reader.line_num + 1
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise csv.Error(f"the quotation mark of the row that begins in line {line} is never closed") from None
            yield line, Unreadable(f"malformed: not CSV ({error})", "".join(taken))
            continue
        if cells is None:
            return
        if cells and len(cells) != len(header):
            yield line, Unreadable(f"malformed: {len(cells)} cells under {len(header)} columns", "".join(taken))
        elif cells:
            yield line, dict(zip(header, map(_cell, cells), strict=True))


def _check_columns(names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two of its columns are named '{twice[0]}'")


def _noting(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _cell(text: str) -> Any:
    """CSV has no lists: a message list stands in its cell as JSON, or as pandas writes it, in Python's form."""
    if not text.startswith("[{"):
        return text
    try:
        value = ast.literal_eval(text) if text.startswith("[{'") else json.loads(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # a list of turns that is damaged is no text
        return [text] if _TURNS.match(text) else text
    turns = isinstance(value, list) and any(isinstance(turn, dict) and turn.keys() & _OF_TURNS for turn in value)
    return value if turns else text


def _parquet(file: IO[bytes]) -> Unparsed:
    import pyarrow.parquet

    with _arrow_errors():
        table = pyarrow.parquet.ParquetFile(_seekable(file))
        _check_columns(table.schema_arrow.names)
        yield from _rows_of(table.iter_batches(batch_size=1000))


def _arrow(file: IO[bytes]) -> Unparsed:
    import pyarrow.ipc

    with _arrow_errors():
        seekable = _seekable(file)
        start = seekable.read(6)
        seekable.seek(0)
        if start == b"ARROW1":
            stored = pyarrow.ipc.open_file(seekable)
            batches: Iterable[Any] = (stored.get_batch(number) for number in range(stored.num_record_batches))
        else:
            batches = stored = pyarrow.ipc.open_stream(seekable)
        _check_columns(stored.schema.names)
        yield from _rows_of(map(_validated, batches))


def _validated(batch: Any) -> Any:
    batch.validate(full=True)  # what it says of its own sizes is believed otherwise, and may point anywhere
    return batch


def _seekable(file: IO[bytes]) -> IO[bytes]:
    return io.BytesIO(file.read()) if isinstance(file, io.BufferedReader) and not isinstance(file.raw, io.FileIO) else file


@contextmanager
def _arrow_errors() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _rows_of(batches: Iterable[Any]) -> Unparsed:
    number = 0
    for batch in batches:
        for index in range(batch.num_rows):
            number += 1
            try:
                row = batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                row = Unreadable("not UTF-8", error.object.decode("utf-8", "surrogateescape"))
            yield number, row
