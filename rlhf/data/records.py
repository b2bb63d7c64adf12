"""Files: JSONL, JSON, CSV and Parquet, each also gzipped, folders of `datasets` and hub datasets, as numbered objects."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rlhf.config.data import FileSource
from rlhf.errors import UserError
from rlhf.paths import inside


@dataclass(frozen=True)
class Unreadable:
    """What stands where an object should stand."""

    reason: str
    raw: str


Records = Iterable[tuple[int, Mapping[str, Any] | Unreadable]]


def records_of(source: FileSource, key: str, root: Path) -> Records:
    """The objects of a source, each with its line (JSONL, CSV) or its number, from 1.

    What is not valid UTF-8 comes as lone surrogates.

    Args:
        source: an entry of data.sources.
        key: where it stands in params.yaml, for example ``data.sources.0``.
        root: what a relative path starts from.

    Raises:
        UserError: there is no such file, folder, split or hub dataset, or it is damaged or of an unknown kind.
    """
    if source.path is None:
        return _of_hub(source, key)
    inside(root, source.path, f"{key}.path")
    path = root / source.path
    return _of_folder(path, source.hub_split, key) if path.is_dir() else _of_file(path, key)


def _of_file(path: Path, key: str) -> Records:
    gzipped = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if gzipped else path.suffix
    if suffix not in _READERS:
        raise UserError(
            f"{key}.path: {path} ends in '{suffix}'", remedy=f"give a file that ends in {', '.join(_READERS)}, each also with .gz"
        )
    try:
        with path.open("rb") as plain:
            yield from _READERS[suffix](cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if gzipped else plain)
    except FileNotFoundError:
        raise UserError(f"{key}.path: no such file: {path}", remedy=f"correct {key}.path in params.yaml, or `dvc pull`") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{key}.path: {path} cannot be read: {what}", remedy="bring an undamaged copy with `rlhf use`") from None


def _jsonl(file: IO[bytes]) -> Records:
    for number, raw in enumerate(file, start=1):
        text = raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip()
        if text:
            yield number, _object(text)


def _object(text: str) -> Mapping[str, Any] | Unreadable:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"malformed: not JSON ({error})", text)
    return value if isinstance(value, dict) else Unreadable("malformed: not a JSON object", text)


def _json(file: IO[bytes]) -> Records:
    content = json.load(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape"))
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError('it holds neither a list nor an object {"data": [...]}; rows one per line belong in a file that ends in .jsonl')
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else Unreadable("malformed: not a JSON object", json.dumps(row))


def _csv(file: IO[bytes]) -> Records:
    csv.field_size_limit(2**31 - 1)
    taken: list[str] = []
    reader = csv.reader(_noting(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""), taken), strict=True)
    header = next(reader, [])
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


def _noting(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _cell(text: str) -> Any:
    # CSV has no lists: a message list stands in its cell as JSON
    value = _object(f'{{"list": {text}}}') if text.startswith("[{") else None
    return value["list"] if isinstance(value, dict) else text


def _parquet(file: IO[bytes]) -> Records:
    import pyarrow.parquet

    seekable = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
    number = 0
    for batch in pyarrow.parquet.ParquetFile(seekable).iter_batches(batch_size=1000):
        for index in range(batch.num_rows):
            number += 1
            try:
                row = batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                row = Unreadable("not UTF-8", error.object.decode("utf-8", "surrogateescape"))
            yield number, row


_READERS: dict[str, Callable[[IO[bytes]], Records]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def parts_of(folder: Path) -> list[Path]:
    """The files of a source that comes in parts, in the order of their names; none in a folder written by `datasets`."""
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return []
    return sorted(path for path in folder.iterdir() if path.with_suffix("" if path.suffix == ".gz" else path.suffix).suffix in _READERS)


def _of_folder(path: Path, split: str | None, key: str) -> Records:
    import datasets

    _check_names(path, key)
    try:
        content = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{key}.path: {path} is no folder of `datasets`: {what}", remedy="write it with Dataset.save_to_disk") from None
    yield from enumerate(_one_split(content, split, str(path), key), start=1)


def _check_names(folder: Path, key: str) -> None:
    """Check that a folder of `datasets` names files of its own only: the library opens whatever stands there.

    Raises:
        UserError: one leads out of the folder.
    """
    for listing in (path for name in ("dataset_dict.json", "state.json") for path in sorted(folder.rglob(name))):
        try:
            content = json.loads(listing.read_text(encoding="utf-8"))
            names = [*content.get("splits", []), *(entry["filename"] for entry in content.get("_data_files", []))]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{key}.path: {listing} cannot be read: {error!r}", remedy="write it with Dataset.save_to_disk") from None
        for name in names:
            inside(folder, listing.parent / str(name), f"{key}.path: {listing}")


def _of_hub(source: FileSource, key: str) -> Records:
    import datasets

    try:
        content = datasets.load_dataset(source.hub, revision=source.revision, split=source.hub_split)
    except Exception as error:  # the hub's client raises errors of a dozen libraries
        what = " ".join(str(error).split())
        raise UserError(
            f"{key}.hub: '{source.hub}' (revision {source.revision}, split {source.hub_split}) cannot be loaded: {what}",
            remedy=f"check hub, revision and hub_split of {key} in params.yaml and the network, or give a file with {key}.path",
        ) from None
    yield from enumerate(_one_split(content, None, str(source.hub), key), start=1)


def _one_split(content: Any, split: str | None, name: str, key: str) -> Iterable[Mapping[str, Any]]:
    splits = content if isinstance(content, dict) else {str(content.split or split): content}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise UserError(
            f"{key}.hub_split is {'not set' if split is None else repr(split)}, but {name} has the splits {', '.join(splits)}",
            remedy=f"set {key}.hub_split to one of them in params.yaml",
        )
    return splits[split]
