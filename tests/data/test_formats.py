"""Every format from every kind of file gives the same rows; bad lines are kept with their place; unreadable files say what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from rlhf.config.data import ColumnSource, SandboxSource, Split
from rlhf.data.formats import Quarantined, Row, read
from rlhf.errors import UserError

COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "messages": "messages"}
COLUMNS |= {"question": "question", "answer": "answer", "text": "text"}
NOTHING = {"text": 0, "sft": 0, "reward": 0, "ppo": 0, "judge": 0, "heldout": 0}
SHARED = Path(__file__).parents[3] / "shared" / "data"

ASK = [{"role": "user", "content": "Wie heißt du?"}]
ANSWERED = [*ASK, {"role": "assistant", "content": "Ada."}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"prompt": "Wie heißt du?", "chosen": "Ada.", "rejected": "Nö."}, {"prompt": "2+2?", "chosen": " 4\n", "rejected": "5"}],
    "messages": [{"messages": ANSWERED}, {"messages": [{"role": "system", "content": "Be brief."}, *ANSWERED]}],
    "qa": [{"question": "Who,\nwhen?", "answer": 'She said "now"'}, {"question": "Why?", "answer": "So."}],
    "text": [{"text": "One – two."}, {"text": "Three."}],
}


def source(form: str, path: str | None, columns: dict[str, str | None] | None = None, **changes: Any) -> ColumnSource:
    values = {
        "name": "mine",
        "format": form,
        "path": path,
        "hub": None,
        "revision": None,
        "hub_split": None,
        "split": NOTHING,
        "weight": 1,
    } | changes
    return ColumnSource.model_validate(values | {"columns": COLUMNS | (columns or {})})


def rows_of(form: str, path: Path, columns: dict[str, str | None] | None = None, **changes: Any) -> list[Row | Quarantined]:
    return list(read(source(form, path.name, columns, **changes), "data.sources.0", path.parent, 1))


def only(form: str, tmp_path: Path, row: Any, columns: dict[str, str | None] | None = None) -> Row | Quarantined:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (result,) = rows_of(form, path, columns)
    return result


def reason(result: Row | Quarantined) -> str:
    assert isinstance(result, Quarantined)
    return result.reason


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    suffix = path.name.split(".")[1]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table)
    elif suffix in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if suffix in ("jsonl", "ndjson") else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
    if path.suffix in PACK:
        path.write_bytes(PACK[path.suffix](path.read_bytes()))
    return path


def zstd(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return bytes(packed.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


# --------------------------------------------------------------------------------------------------------- formats × files


@pytest.mark.parametrize("form", ["pairs", "messages", "qa", "text"])
@pytest.mark.parametrize(
    "ending",
    [
        "json",
        "ndjson",
        "csv",
        "tsv",
        "parquet",
        "arrow",
        "jsonl.gz",
        "json.bz2",
        "csv.xz",
        "tsv.zst",
        "parquet.gz",
        "arrow.zst",
        "jsonl.xz",
    ],
)
def test_a_format_reads_the_same_from_every_file(form: str, ending: str, tmp_path: Path) -> None:
    expected = rows_of(form, write(tmp_path / "rows.jsonl", ROWS[form]))
    assert [type(row) for row in expected] == [Row, Row]
    got = rows_of(form, write(tmp_path / f"rows.{ending}", ROWS[form]))
    assert [vars(row) | {"file": "", "line": 0} for row in got] == [vars(row) | {"file": "", "line": 0} for row in expected]


def test_hh_shares_all_turns_but_the_last(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman:  Go on: please\n\nAssistant:"
    row = only("hh", tmp_path, {"chosen": start + " Sure.", "rejected": start + " No.\n"})
    roles = ["user", "assistant", "user"]
    prompt = tuple({"role": role, "content": content} for role, content in zip(roles, ["Hi", "Yes?", "Go on: please"], strict=True))
    assert row == Row("mine", "one.jsonl", 1, "pairs", prompt, "Sure.", "No.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (
            "\n\nHuman: a\n\nAssistant: b",
            "\n\nHuman: other\n\nAssistant: c",
            "malformed: chosen and rejected differ before the last answer",
        ),
        ("\n\nHuman: a", "\n\nHuman: a\n\nAssistant: c", "no assistant turn: 'chosen' ends in a turn of role 'user'"),
        ("plain words", "\n\nHuman: a\n\nAssistant: c", "malformed: 'chosen' does not begin with 'Human:' or 'Assistant:'"),
        (None, "\n\nHuman: a\n\nAssistant: c", "empty: 'chosen' is null"),
        (7, "\n\nHuman: a\n\nAssistant: c", "malformed: 'chosen' is of type int, not text"),
        ([], "\n\nHuman: a\n\nAssistant: c", "empty: 'chosen' has no turns"),
    ],
)
def test_hh_bad_rows_say_why(chosen: Any, rejected: str, expected: str, tmp_path: Path) -> None:
    assert reason(only("hh", tmp_path, {"chosen": chosen, "rejected": rejected})) == expected


@pytest.mark.parametrize("prompt", ["Wie heißt du?", ASK])
@pytest.mark.parametrize("chosen", ["Ada.", ANSWERED, ANSWERED[1:]])
def test_pairs_take_text_answer_turns_and_whole_dialogues(prompt: Any, chosen: Any, tmp_path: Path) -> None:
    row = only("pairs", tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": [{"role": "assistant", "content": "Nö."}]})
    assert row == Row("mine", "one.jsonl", 1, "pairs", tuple(ASK), "Ada.", "Nö.")


def test_pairs_without_a_prompt_column(tmp_path: Path) -> None:
    row = {"chosen": ANSWERED, "rejected": [*ASK, {"role": "assistant", "content": "Nö."}]}
    assert only("pairs", tmp_path, row, {"prompt": None}) == Row("mine", "one.jsonl", 1, "pairs", tuple(ASK), "Ada.", "Nö.")


def test_questions_in_a_column_that_is_not_read_are_told_with_the_key(tmp_path: Path) -> None:
    row = {"prompt": "What?", "chosen": "This.", "rejected": "That."}
    given: dict[str, dict[str, str | None]] = {"hh": {}, "pairs": {"prompt": None}}
    for form, columns in given.items():
        said = "for the question in 'prompt' set format: pairs and columns.prompt: prompt"
        assert reason(only(form, tmp_path, row, columns)) == f"malformed: 'chosen' does not begin with 'Human:' or 'Assistant:'; {said}"


def test_pairs_whose_dialogue_is_another_one(tmp_path: Path) -> None:
    row = {"prompt": "Else?", "chosen": ANSWERED, "rejected": "b"}
    assert reason(only("pairs", tmp_path, row)) == "malformed: 'chosen' is a dialogue that does not begin with the prompt"


def test_prompts_alone(tmp_path: Path) -> None:
    for prompt in ("Wie heißt du?", ASK):
        assert only("prompts", tmp_path, {"prompt": prompt}) == Row("mine", "one.jsonl", 1, "prompts", tuple(ASK))


def test_message_without_content(tmp_path: Path) -> None:
    row = {"messages": [*ASK, {"role": "assistant", "content": None}]}
    assert reason(only("messages", tmp_path, row)) == "malformed: turn 2 of 'messages' is not an object with role and content as text"


def test_sandbox_rows() -> None:
    made = SandboxSource(name="made", format="sandbox", kind="prompts", kinds=None, rows=3, label_noise=0, split=Split(**NOTHING), weight=1)
    rows = list(read(made, "k", Path(), 1))
    assert [row.line for row in rows] == [1, 2, 3]
    assert all(isinstance(row, Row) and row.file == "sandbox" and row.kind == "prompts" and row.prompt and row.gold for row in rows)


@pytest.mark.parametrize(
    ("name", "form", "good", "all_rows"), [("hh-rlhf-harmless-1500", "hh", 1490, 1500), ("gsm8k-2000", "qa", 2000, 2000)]
)
def test_real_files(name: str, form: str, good: int, all_rows: int) -> None:
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    rows = rows_of(form, path)
    assert [row.line for row in rows] == list(range(1, all_rows + 1))
    assert sum(isinstance(row, Row) for row in rows) >= good


# --------------------------------------------------------------------------------------------------------------- bad lines


def test_bad_lines_of_jsonl_keep_place_reason_and_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b'{"text": "caf\xe9"}',
        b"",
        b"{oops",
        b"[1]",
        b'{"text": "\\ud800"}',
        b'{"other": 1}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    rows = rows_of("text", path)
    assert [row.line for row in rows] == [1, 2, 4, 5, 6, 7, 8]
    assert [row.text if isinstance(row, Row) else row.reason.partition(" (")[0] for row in rows] == [
        "first",
        "not UTF-8: byte 0xe9",
        "malformed: not JSON",
        "malformed: not a JSON object",
        "not UTF-8: lone surrogate U+D800",
        "malformed: no column 'text'",
        "last",
    ]
    assert [row.row for row in rows if isinstance(row, Quarantined)] == [
        {"text": "caf\udce9"},
        "{oops",
        "[1]",
        {"text": "\ud800"},
        {"other": 1},
    ]


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'question,answer\n"two\nlines",a\nlonely\n"q"x,a\nq\xff,a\n\n"say ""hi""",b\n')
    rows = rows_of("qa", path)
    assert [(row.line, row.reason if isinstance(row, Quarantined) else row.chosen) for row in rows] == [
        (2, "a"),
        (4, "malformed: 1 cells under 2 columns"),
        (5, "malformed: not CSV (',' expected after '\"')"),
        (6, "not UTF-8: byte 0xff"),
        (8, "b"),
    ]
    assert [row.row for row in rows if isinstance(row, Quarantined)] == ["lonely\n", '"q"x,a\n', {"question": "q\udcff", "answer": "a"}]


def test_bad_rows_of_json_and_parquet(tmp_path: Path) -> None:
    listed = tmp_path / "rows.json"
    listed.write_bytes(b'{"data": [{"text": "good"}, 5, {"text": "\xff"}]}')
    assert [(row.line, getattr(row, "reason", "")) for row in rows_of("text", listed)] == [
        (1, ""),
        (2, "malformed: not a JSON object"),
        (3, "not UTF-8: byte 0xff"),
    ]
    table = tmp_path / "rows.parquet"
    cells = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": cells}), table)
    good, bad = rows_of("text", table)
    assert isinstance(good, Row)
    assert isinstance(bad, Quarantined)
    assert (bad.line, reason(bad), bad.row) == (2, "not UTF-8: byte 0xe9", "caf\udce9")


# ------------------------------------------------------------------------------------------------------- unreadable sources


def refusal(form: str, path: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        rows_of(form, path, **changes)
    return str(error.value)


def test_a_column_missing_from_every_row(tmp_path: Path) -> None:
    message = refusal("qa", write(tmp_path / "rows.csv", [{"question": "q", "reply": "a"}]))
    assert "no row of rows.csv has a column 'answer'; its columns are 'question', 'reply'" in message
    assert "data.sources.0.columns.answer" in message
    message = refusal("qa", write(tmp_path / "rows.csv", [{"Question": "q", "ANSWER": "a"}]))
    assert "no row of rows.csv has a column 'question', 'answer'; its columns are 'Question', 'ANSWER'" in message
    assert "set data.sources.0.columns.question=Question, data.sources.0.columns.answer=ANSWER in params.yaml" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "data.sources.0.path: no such file" in refusal("text", tmp_path / "gone.jsonl")
    (tmp_path / "rows.xlsx").write_bytes(b"")
    assert "'.xlsx'" in refusal("text", tmp_path / "rows.xlsx")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert "empty.jsonl holds no rows" in refusal("text", tmp_path / "empty.jsonl")
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, content in {
        "cut.jsonl.gz": whole[:-20],
        "bad.parquet": b"PAR1",
        "bad.json": b"[{",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read" in refusal("text", tmp_path / name)
    (tmp_path / "open.csv").write_text('text\nfine\n"never closed\nmore\n')
    assert "row that begins in line 3 is never closed" in refusal("text", tmp_path / "open.csv")


# ----------------------------------------------------------------------------------------------------------------- datasets


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS["messages"])
    table.save_to_disk(tmp_path / "one")
    assert [row.line for row in rows_of("messages", tmp_path / "one") if isinstance(row, Row)] == [1, 2]
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    assert len(rows_of("messages", tmp_path / "two", hub_split="test")) == 1
    assert "data.sources.0.hub_split is not set" in refusal("messages", tmp_path / "two")
    assert "'dev', but" in refusal("messages", tmp_path / "two", hub_split="dev")
    assert "one is a folder of `datasets` in a folder of files (give it a source of its own)" in refusal("messages", tmp_path)
    (tmp_path / "none").mkdir()
    assert "is no folder of `datasets` and holds no data file" in refusal("messages", tmp_path / "none")


def test_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a folder of data files opens by the same call as a hub id
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repository").mkdir()
    write(tmp_path / "repository" / "train.jsonl", ROWS["qa"])
    hub = source("qa", None, hub=str(tmp_path / "repository"), revision="v1", hub_split="train")
    rows = list(read(hub, "data.sources.0", tmp_path, 1))
    assert [(row.line, row.file) for row in rows] == [(1, f"{hub.hub}@v1"), (2, f"{hub.hub}@v1")]
    assert rows == list(read(hub.model_copy(update={"hub_split": None}), "data.sources.0", tmp_path, 1))


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.sources\.0\.hub: 'nobody/nothing' \(revision v1, split train\) cannot be loaded"):
        list(read(source("qa", None, hub="nobody/nothing", revision="v1", hub_split="train"), "data.sources.0", tmp_path, 1))
