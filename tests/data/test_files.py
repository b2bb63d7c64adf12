"""What a file is, its content says; a folder of files is read by splits, and nothing in it is passed over unsaid."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from rlhf.data.folders import split_of
from rlhf.data.formats import Quarantined, Row
from tests.data.test_formats import refusal, rows_of, zstd

TEXTS = [{"text": "One, and more."}, {"text": "Two\nlines."}]
LINES = "".join(json.dumps(row) + "\n" for row in TEXTS)
QUOTED = '"One, and more."', '"Two\nlines."'


def archive() -> bytes:
    with zipfile.ZipFile(made := io.BytesIO(), "w") as packed:
        packed.writestr("rows.jsonl", LINES)
    return made.getvalue()


def texts(path: Path, **changes: Any) -> list[str | None]:
    return [row.text if isinstance(row, Row) else row.reason for row in rows_of("text", path, **changes)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES),
        ("lines.csv", LINES),
        ("crlf.json", LINES.replace("\n{", "\r\n{")),
        ("list.jsonl", json.dumps(TEXTS)),
        ("indented.jsonl", json.dumps(TEXTS, indent=2)),
        ("indented.json", json.dumps(TEXTS, indent=2)),
        ("list.csv", json.dumps(TEXTS, indent=1)),
        ("data.json", json.dumps({"version": 1, "data": TEXTS})),
        ("one_after_the_other.json", "\n".join(json.dumps(row, indent=2) for row in TEXTS)),
        ("a_row_a_line.json", "[" + ",\n".join(json.dumps(row) for row in TEXTS) + "]"),
        ("packed.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("packed.jsonl.gz", zstd(LINES.encode())),
        ("plain.jsonl.gz", LINES),
        ("UPPER.JSONL", LINES),
        ("comma.tsv", "id,text\n1,{}\n2,{}\n".format(*QUOTED)),
        ("tab.csv", "id\ttext\n1\t{}\n2\t{}\n".format(*QUOTED)),
        ("semicolon.csv", "id;text\n1;{}\n2;{}\n".format(*QUOTED)),
        ("spaced.csv", "id, text \n1,{}\n2,{}\n".format(*QUOTED)),
        ("pipe.csv", "id|text\n1|{}\n2|{}\n".format(*QUOTED)),
    ],
)
def test_the_content_decides_not_the_name(name: str, content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert texts(tmp_path / name) == [row["text"] for row in TEXTS]


def test_a_stream_of_arrow_and_parquet_by_another_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(TEXTS)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as sink:
        sink.write_table(table)
    pyarrow.parquet.write_table(table, tmp_path / "rows.jsonl")
    assert texts(tmp_path / "stream.arrow") == texts(tmp_path / "rows.jsonl") == [row["text"] for row in TEXTS]


def test_a_damaged_first_line_leaves_the_others(tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text("{oops\n" + LINES)
        assert texts(tmp_path / name)[1:] == [row["text"] for row in TEXTS]
    (tmp_path / "cut.jsonl").write_text('{"text": "One')
    (row,) = rows_of("text", tmp_path / "cut.jsonl")
    assert isinstance(row, Quarantined)
    assert row.reason.startswith("malformed: not JSON")


def test_a_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "é" * 3 * number + "]},[{\n"} for number in range(1, 40)]
    for indent in (None, 3):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8-sig")
        whole = texts(tmp_path / "a.json")
        assert whole == [row["text"] for row in rows]
        for size in (1, 7, 64):
            monkeypatch.setattr("rlhf.data.jsons.CHUNK", size)
            assert texts(tmp_path / "a.json") == whole


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of git-lfs, not the data"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of git-lfs, not the data"),
        ("a.csv", b"\n<!DOCTYPE html><html>", "is a web page, not the data"),
        ("a.csv", "text\nOne".encode("utf-16"), "is UTF-16"),
        ("a.csv", "text\nOne".encode("utf-16-be"), "is UTF-16 or no text at all"),
        ("a.jsonl", LINES.encode("utf-16-le"), "is UTF-16 or no text at all"),
        ("a.jsonl", LINES.encode("utf-32"), "is UTF-32"),
        ("a.jsonl", archive(), "is a zip archive, or a table of Excel"),
        ("a.xlsx", archive(), "is a zip archive, or a table of Excel"),
        ("a.parquet", archive(), "is a zip archive, or a table of Excel"),
        ("a.jsonl.gz", gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", mtime=0), "is a tar archive"),
        ("a.jsonl", pickle.dumps(TEXTS), "is a pickle of Python, which could run code"),
        ("a.txt", b"One\n", "ends in '.txt'"),
        ("pairs", b"One\n", "has no ending"),
        ("a.csv", b"text,text\na,b\n", "two of its columns are named 'text'"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "row 2: it ends in the middle"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "row 1: '{' stands where ',' must stand"),
        ("a.json", b'[{"text": "a"}] [', "more stands behind its list"),
        ("a.json", b'[{"text": "a"}, {"text": "a", "text": "b"}]', "row 2: the key 'text' stands twice in one object"),
        ("a.json", b'{"id": ["1", "2"], "text": ["a", "b"]}', "it holds columns and not rows"),
        ("a.json", b'{"id": {"0": 1, "1": 2}, "text": {"0": "a", "1": "b"}}', "it holds columns and not rows"),
        ("a.json", b'{"train": [{"text": "a"}], "test": []}', "read was one row alone: rows are lines, a list, or an object"),
        ("a.jsonl.zst", zstd(LINES.encode())[:-3], "cannot be read: Truncated compressed stream"),
        ("a.arrow", b"ARROW1", "a.arrow cannot be read"),
    ],
)
def test_what_often_stands_in_the_place_of_data(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refusal("text", tmp_path / name)


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n{"text": "c"}\n')
    assert texts(tmp_path / "a.jsonl") == ["malformed: not JSON (the key 'text' stands twice in one object)", "c"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ('[{"role": "user", "content": "Hi"}]', "Hi"),
        ("[{'role': 'user', 'content': \"Don't\"}]", "Don't"),
        ('[{"name": "Ada"}]', '[{"name": "Ada"}]'),
        ("[{ no JSON", "[{ no JSON"),
        ('[{"role": "user", "content": "Hi"}, ""]', "malformed: turn 2 of 'prompt' is not an object with role and content as text"),
        ('[{"role": "user", "content": "\\4"}]', "malformed: turn 1 of 'prompt' is not an object with role and content as text"),
        ("[{'role': 'user' 'content': 'Hi'}]", "malformed: turn 1 of 'prompt' is not an object with role and content as text"),
    ],
)
def test_lists_of_turns_in_cells(cell: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\n"{}",a,b\n'.format(cell.replace('"', '""')), encoding="utf-8")
    (row,) = rows_of("pairs", path)
    assert (row.prompt[0]["content"] if isinstance(row, Row) else row.reason) == expected


def test_arrow_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one", "two"]})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as sink:
        sink.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    sizes = struct.pack("<3i", 0, 3, 6)
    assert content.count(sizes) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(sizes, struct.pack("<3i", 0, 3, -6)))
    assert "a.arrow cannot be read" in refusal("text", tmp_path / "a.arrow")


# ----------------------------------------------------------------------------------------------------------------- folders


def folder_of(place: Path, *names: str) -> Path:
    for name in names:
        path = place / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n" if path.suffix != ".csv" else f"text\n{name}\n")
    return place / "folder"


def test_a_folder_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "train.jsonl", "test.jsonl", "2026-01/more.jsonl", "README.md", ".cache/x.jsonl")
    assert (
        "data.sources.0.hub_split is not set, but "
        f"{folder} has the splits test (test.jsonl), train (2026-01/more.jsonl, train.jsonl)" in refusal("text", folder)
    )
    assert texts(folder, hub_split="train") == ["2026-01/more.jsonl", "train.jsonl"]
    assert texts(folder, hub_split="test") == ["test.jsonl"]
    assert "hub_split is 'dev', but" in refusal("text", folder, hub_split="dev")
    assert [row.file for row in rows_of("text", folder, hub_split="train")] == ["folder/2026-01/more.jsonl", "folder/train.jsonl"]


def test_folders_name_splits_too_and_subfolders_are_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "train/a.jsonl", "train/b.csv", "valid/a.jsonl", "c.json")
    assert texts(folder, hub_split="train") == ["c.json", "train/a.jsonl", "train/b.csv"]
    assert texts(folder, hub_split="validation") == ["valid/a.jsonl"]


def test_one_split_alone_need_not_be_named(tmp_path: Path) -> None:
    assert texts(folder_of(tmp_path / "a", "test-1.jsonl", "test-2.jsonl")) == ["test-1.jsonl", "test-2.jsonl"]
    assert texts(folder_of(tmp_path / "b", "2026-01-01.jsonl", "deep/er/x.csv")) == ["2026-01-01.jsonl", "deep/er/x.csv"]


@pytest.mark.parametrize("other", ["notes.xlsx", "sub/rows.txt", "data.zip"])
def test_what_would_be_passed_over_is_named(other: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jsonl", other)
    assert f"holds {other}, which is no kind of data file that can be read" in refusal("text", folder)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/a").symlink_to(folder)
    assert "a is a link to a folder" in refusal("text", tmp_path / "linked")


def test_a_split_of_a_lone_file_is_that_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(LINES)
    assert texts(tmp_path / "test.jsonl") == texts(tmp_path / "test.jsonl", hub_split="test") == [row["text"] for row in TEXTS]
    assert "hub_split is 'train', but" in refusal("text", tmp_path / "test.jsonl", hub_split="train")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("rows.jsonl", "train"),
        ("my_test_set.jsonl", "test"),
        ("latest.jsonl", "train"),
        ("contest/rows.jsonl", "train"),
        ("Validation.parquet", "validation"),
        ("test/train.jsonl", "train"),
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("2026-01-01T000000-train_sft-00000-of-00003.parquet", "train_sft"),
        ("data-00000-of-00001.arrow", "train"),
        ("eval.jsonl", "test"),
        ("dev2.jsonl", "validation"),
    ],
)
def test_names_tell_the_split(name: str, split: str) -> None:
    assert split_of(Path(name)) == split
