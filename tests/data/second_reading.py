"""A second, simple reading of rows, that shares nothing with rlhf/data: what a row that was taken must say."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from rlhf.data.formats import Row

SPOKEN = {"human": "user", "gpt": "assistant", "developer": "system", "model": "assistant", "function": "tool"}
READ = {"role", "from", "content", "value", "text", "weight", "loss", "loss_weight", "trainable", "train", "train_on_turn"}
READ |= {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id"}
MARKERS = ("Human", "Assistant", "User", "用户", "助手", "人間", "アシスタント")
MARKS = ("weight", "loss", "loss_weight", "trainable", "train", "train_on_turn")


def differs(form: str, writer: str, record: dict[str, Any] | None, content: bytes, row: Row) -> str | None:
    """In what a row differs from its record; where only the file is known, from what stands there under the row's line."""
    if record is None:
        if writer in ("csv", "tsv"):
            return _not_in_text(content, row)
        record = _at(writer, content, row.line)
        if record is None:
            return None if writer in ("parquet", "arrow") else _not_in_text(content, row)
    elif writer in ("csv", "tsv"):
        record = {name: _cell(value) for name, value in record.items()}
    if form == "text":
        return None if row.text == record["text"] else "the text"
    if form in ("hh", "pairs", "messages", "qa"):
        return globals()[f"_{form}"](record, row) or _beside(record, row)
    leaves = [_bare(leaf) for value in record.values() for leaf in (*_leaves(value), *_leaves(_parsed(value)))]
    lost = [said for said in _said(row) for part in said.split("\n\n") if not any(_bare(part) in leaf for leaf in leaves)]
    return f"{lost[0]!r} stands nowhere in it" if lost else None


def _cell(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value)


def _at(writer: str, content: bytes, line: int) -> dict[str, Any] | None:
    """The record of a number in a damaged file; None where this reading cannot find it."""
    try:
        if writer in ("parquet", "arrow"):
            buffer = io.BytesIO(content)
            table = pyarrow.parquet.read_table(buffer) if writer == "parquet" else pyarrow.ipc.open_file(buffer).read_all()
            return dict(table.to_pylist()[line - 1])
        if writer == "jsonl":
            objects = _one_after_the_other(content.decode("utf-8-sig"))
            return dict(objects[line - 1] if objects else json.loads(content.split(b"\n")[line - 1].decode("utf-8-sig")))
        whole = json.loads(content.decode("utf-8-sig"))
        return dict((whole["data"] if isinstance(whole, dict) else whole)[line - 1])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None


def _one_after_the_other(text: str) -> list[Any]:
    """The objects of a text whose first line is none; nothing where its lines count, as the first is one, or where it is damaged."""
    found: list[Any] = []
    rest = text.strip()
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        if not found and "\n" not in rest[:end]:
            return []
        found.append(value)
        rest = rest[end:].strip()
    return found


def _not_in_text(content: bytes, row: Row) -> str | None:
    there = _bare(content.decode("utf-8", "replace"))
    unescaped = _bare(re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), there))
    for said in (part for text in _said(row) for part in text.split("\n\n")):
        forms = (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
        if not any(_bare(form) in text for form in forms for text in (there, unescaped, there.replace('""', '"'))):
            return f"{said!r} stands nowhere in the file"
    return None


def _bare(words: str) -> str:
    return re.sub(r"\s", "", words)


def _said(row: Row) -> list[str]:
    return [text for text in (*(turn["content"] for turn in row.prompt), row.chosen, row.rejected, row.text) if text]


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("[{") else None
    except ValueError:
        return None


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _leaves(inner)


# ------------------------------------------------------------------------------------------------------------------ formats


def _turn(turn: dict[str, Any]) -> tuple[str, str, bool]:
    """Who speaks, what, and whether it is marked as not to be learnt."""
    who = str(turn["role"] if turn.get("role") is not None else turn["from"])
    said: Any = next((turn[name] for name in ("content", "value", "text") if turn.get(name) is not None), "")
    if isinstance(said, list):
        said = "".join(part["text"] for part in said)
    return SPOKEN.get(who.lower(), who.lower()), said.strip(), any(turn.get(name) is not None and not turn[name] for name in MARKS)


def _dialogue(value: Any) -> list[tuple[str, str, bool]]:
    if isinstance(value, dict):
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return [_turn(turn) for turn in (json.loads(value) if isinstance(value, str) else value)]  # text: in a cell of CSV


def _of_row(row: Row) -> list[tuple[str, str, bool]]:
    turns = (*row.prompt, {"role": "assistant", "content": row.chosen})
    return [(turn["role"], turn["content"].strip(), "weight" in turn) for turn in turns]


def _without_system(record: dict[str, Any], row: Row, expected: list[tuple[str, str, bool]]) -> list[tuple[str, str, bool]]:
    """The dialogue of a row without a system turn that stands in a column of its own."""
    found = _of_row(row)
    column = next((record[name] for name in ("system", "system_prompt") if record.get(name)), None)
    return found[1:] if column and expected[:1] != found[:1] and found[0][:2] == ("system", column.strip()) else found


def _messages(record: dict[str, Any], row: Row) -> str | None:
    there = _dialogue(record["messages"])
    found = _without_system(record, row, there)
    if found != there[: len(found)]:
        return f"the turns are {there}"
    if any(who == "assistant" and not marked for who, _, marked in there[len(found) :]) or found[-1][2]:
        return "an answer to be learnt is left out, or one not to be is learnt"
    turns = json.loads(record["messages"]) if isinstance(record["messages"], str) else record["messages"]
    if isinstance(turns, dict):
        return None
    unknown = {name for turn in turns for name, value in turn.items() if value not in (None, "", [], {}) and name not in READ}
    if not {f"turns.{name}" for name in unknown} <= set(row.unread):
        return f"nothing says that {unknown} is not read"
    if any(turn.get("tool_calls") for turn in turns[: len(found)]) and "tool_calls" not in str([row.prompt, row.beside, row.unread]):
        return "calls of tools are lost"
    return None


def _pairs(record: dict[str, Any], row: Row) -> str | None:
    asked = [("user", record["prompt"].strip(), False)] if _is_text(record["prompt"]) else _dialogue(record["prompt"])
    sides = [record[side].strip() if _is_text(record[side]) else _dialogue(record[side])[-1][1] for side in ("chosen", "rejected")]
    there = [*asked, ("assistant", sides[0], False)]
    return None if _without_system(record, row, there) == there and row.rejected == sides[1] else f"it is {there}, {sides[1]!r}"


def _qa(record: dict[str, Any], row: Row) -> str | None:
    asked = [("user", record["question"].strip(), False)] if _is_text(record["question"]) else _dialogue(record["question"])
    answer = record["answer"].strip() if _is_text(record["answer"]) else _dialogue(record["answer"])[-1][1]
    there = [*asked, ("assistant", answer, False)]
    return None if _without_system(record, row, there) == there else f"it is {there}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not (value.startswith("[{") and ('"role"' in value or '"from"' in value))


def _hh(record: dict[str, Any], row: Row) -> str | None:
    """Put together again with its markers, it is the text, but for spaces and colons."""
    for side, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        if isinstance(record[side], list):
            continue
        rest = re.sub(r"[:：\s]", "", record[side])
        prompt = row.prompt[1:] if row.prompt[0]["role"] == "system" else row.prompt
        for piece in [turn["content"] for turn in prompt] + [answer]:
            bare = re.sub(r"[:：\s]", "", str(piece))
            marker = next((word for word in MARKERS if rest.startswith(word + bare)), None)
            if marker is None:
                return f"{piece!r} does not follow its marker in {side}"
            rest = rest[len(marker + bare) :]
        if rest:
            return f"{rest!r} is left over of {side}"
    return None


def _beside(record: dict[str, Any], row: Row) -> str | None:
    if record.get("tools") and "tools" not in row.prompt[0]:
        return "the tools are lost"
    column = next((record[name] for name in ("system", "system_prompt") if record.get(name)), None)
    if isinstance(column, str) and column.strip() and row.prompt[0]["role"] != "system":
        return "the system prompt is lost"
    return None
