"""New rows: checked against what is there, added as a dated part, versioned, and read by stage prepare's reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import yaml

from rlhf import config
from rlhf.cli.ingest import ingest
from rlhf.data.formats import Row, read
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.workspace import presets

PROJECT = Path(__file__).parents[2]
FIRST = [{"text": f"Passage number {number}."} for number in range(20)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A DVC workspace whose only file source is `notes`, of one file."""
    root = tmp_path / "workspace"
    for folder in ("presets", "graphs"):
        shutil.copytree(PROJECT / folder, root / folder)
    raw = yaml.safe_load((PROJECT / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    columns = dict.fromkeys(("prompt", "chosen", "rejected", "messages", "question", "answer"), "x") | {"text": "text"}
    split = {"text": 1, "sft": 0, "reward": 0, "ppo": 0, "judge": 0, "heldout": 0}
    place = {"path": str(write(tmp_path / "first.jsonl", FIRST)), "hub": None, "revision": None, "hub_split": None, "weight": 1}
    raw["data"]["sources"].append({"name": "notes", "format": "text", "columns": columns, "split": split, **place})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    subprocess.run([Path(sys.executable).with_name("dvc"), "init", "--quiet"], cwd=root, check=True)
    presets.use(root, str(tmp_path / "mine.yaml"), [])
    return root


def params(root: Path) -> config.Params:
    return config.load(root / "params.yaml")


def texts(root: Path) -> list[str | None]:
    return [row.text if isinstance(row, Row) else row.reason for row in read(params(root).data.sources[-1], "data.sources.4", root, 0)]


def md5(root: Path) -> str:
    return yaml.safe_load((root / "data/raw/notes.dvc").read_text(encoding="utf-8"))["outs"][0]["md5"]


def test_new_rows_become_a_dated_part(root: Path, tmp_path: Path) -> None:
    before = md5(root)
    new = write(tmp_path / "monday.jsonl", [{"text": "Something new."}, FIRST[3], {"text": "Something else."}])
    done = ingest(root, params(root), [new], None)
    assert (done.source, done.rows) == ("notes", 2)
    assert done.lines[0] == f"{new}: 2 new rows, 1 duplicate"
    (part,) = done.parts
    assert part.startswith("data/raw/notes/20")
    assert part.endswith("-monday.jsonl")
    assert params(root).data.sources[-1].path == "data/raw/notes"  # type: ignore[union-attr]  # the sandbox of a fresh checkout has sources without a path
    assert md5(root) != before
    assert {"Passage number 0.", "Something new.", "Something else."} <= set(texts(root))

    # a second delivery of the same is nothing new; of two files at once, each is a part
    before = md5(root)
    again = ingest(root, params(root), [new], "notes")
    assert (again.parts, again.rows, md5(root)) == ([], 0, before)
    (tmp_path / "other").mkdir()
    two = [write(tmp_path / "tuesday.jsonl", [{"text": "A."}]), write(tmp_path / "other/tuesday.jsonl", [{"text": "B."}])]
    assert len(set(ingest(root, params(root), two, "notes").parts)) == 2
    assert {"A.", "B."} <= set(texts(root))
    assert md5(root) != before


def test_damaged_rows_are_named_and_nothing_is_added(root: Path, tmp_path: Path) -> None:
    before, files = md5(root), sorted((root / "data/raw/notes").iterdir())
    good, bad = write(tmp_path / "good.jsonl", [{"text": "Good."}]), write(tmp_path / "bad.jsonl", [{"text": "Fine."}, {"text": " "}])
    with pytest.raises(UserError) as caught:
        ingest(root, params(root), [good, bad], None)
    assert caught.value.what == f"{bad}: 1 of 2 rows are damaged (line 2: empty: text); nothing was added"
    assert (md5(root), sorted((root / "data/raw/notes").iterdir())) == (before, files)
    with pytest.raises(UserError, match="'letters' is no source that reads a file"):
        ingest(root, params(root), [good], "letters")
    with pytest.raises(UserError, match="by its name its rows are of the split 'test'; nothing was added"):
        ingest(root, params(root), [write(tmp_path / "test.jsonl", [{"text": "Held out."}])], None)
    with lock(root, "flow"), pytest.raises(UserError, match="a retraining flow is reading the data"):
        ingest(root, params(root), [good], None)


def test_memory_grows_with_digests_and_not_with_rows(root: Path, tmp_path: Path) -> None:
    count, long = 10_000, "word " * 190
    ingest(root, params(root), [write(tmp_path / "many.jsonl", [{"text": f"{number} {long}"} for number in range(count)])], None)
    new = write(tmp_path / "again.jsonl", [{"text": f"{number} {long}"} for number in range(count + 10)])
    tracemalloc.start()
    done = ingest(root, params(root), [new], None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.lines[0] == f"{new}: 10 new rows, 10000 duplicate"
    assert peak < 600 * count  # a row has 1 kB
