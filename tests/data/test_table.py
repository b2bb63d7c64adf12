"""The table of all rows finds the repetitions that a check one row after another finds, for the same reasons."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import SLICES, ColumnSource
from rlhf.data.examine import BATCH_BYTES, batches, examine
from rlhf.data.formats import files_of, read
from rlhf.data.prepared import as_pair, lines_of, quarantine_line, refused_lines
from rlhf.data.table import Table
from rlhf.data.validate import Checker


def source(name: str, path: str) -> ColumnSource:
    columns = {key: key for key in ("prompt", "chosen", "rejected", "messages", "question", "answer", "text")}
    place = {"path": path, "hub": None, "revision": None, "hub_split": None}
    split = dict.fromkeys(SLICES, 1.0)
    return ColumnSource.model_validate({"name": name, "format": "pairs", "columns": columns, "split": split, "weight": 1, **place})


def write(path: Path, draw: random.Random, count: int) -> None:
    """Pairs out of few, so that many repeat or contradict earlier ones; some are bad by themselves."""
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            chosen, rejected = (draw.choice(["a", "b", "c"]) for _ in range(2))
            row = {"prompt": f"{draw.randrange(30)}?", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n" if draw.random() < 0.95 else draw.choice(["{\n", "\n", "[]\n", '{"prompt": "x"}\n']))


@pytest.mark.parametrize("trial", range(5))
def test_as_one_row_after_another(trial: int, tmp_path: Path) -> None:
    draw = random.Random(trial)
    sources = [source("one", "parts"), source("two", "two.jsonl"), source("three", "three.jsonl")]
    (tmp_path / "parts").mkdir()
    for name in ("parts/a.jsonl", "parts/b.jsonl", "two.jsonl", "three.jsonl"):
        write(tmp_path / name, draw, 60)

    checker = Checker(100)
    with Table(tmp_path / "rows") as table:
        for number, one in enumerate(sources):
            for file, records in files_of(one, "", tmp_path, 0):
                table.begin(number, file)
                for batch in batches(one, file, records, 100):
                    table.add(examine(batch))
        table.close()
        again: set[str] = set()
        for number, one in enumerate(sources):
            good, bad = checker.divide(read(one, "", tmp_path, 0))
            assert lines(map(lines_of, table.extracts(table.good(number), as_pair))) == [wrote(as_pair(row)) for row in good]
            assert lines(map(refused_lines, table.refused(table.bad(number)))) == [quarantine_line(row) for row in bad]
            assert [table.place(row) for row in table.bad(number)] == [(row.file, row.line) for row in bad]
            again |= table.reasons(table.bad(number)).keys()
    assert again == {"malformed", "chosen equals rejected", "duplicate", "contradiction", "in another source"}
    assert not table.packed.exists()


def lines(parts: Any) -> list[bytes]:
    return b"".join(parts).splitlines(keepends=True)


def wrote(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def test_long_rows_make_small_batches() -> None:
    records = [(number, b"x" * (BATCH_BYTES // 2)) for number in range(5)]
    found = list(batches(source("one", "x"), "x", records, 100))
    assert [[line for line, _ in batch.records] for batch in found] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("depth", [10, 300, 900, 950, 980, 1000, 5000])
def test_rows_nested_to_any_depth_go_to_quarantine(depth: int) -> None:
    row = b'{"chosen": "a", "rejected": "b", "other": ' + b"[" * depth + b'"\xc3\xa4"' + b"]" * depth + b"}\n"
    (found,) = batches(source("one", "deep.jsonl"), "deep.jsonl", [(1, row)], 100)
    examined = examine(found)
    assert examined.values["category"] == ["", "malformed"]
    assert json.loads(examined.packed)["line"] == 1
