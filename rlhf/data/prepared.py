"""Lines of the files of data/prepared, out of rows that lie packed in a file."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.examples import dialogue
from rlhf.data.fields import Turn
from rlhf.data.formats import Quarantined, Row

Render = Callable[[Row], dict[str, Any]]


def as_text(row: Row) -> dict[str, Any]:
    turns = dialogue(row)
    # pretraining learns every word: it begins behind an answer that is not to be learnt
    first = max((place for place, turn in enumerate(turns, start=1) if turn["role"] == "assistant" and "weight" in turn), default=0)
    return {"text": row.text or "\n\n".join(map(_said, turns[first:]))}


def _said(turn: Turn) -> str:
    names = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return f"{names[turn['role']]}: " + "\n".join(filter(None, (turn["content"], *calls)))


def as_messages(row: Row) -> dict[str, Any]:
    return {"messages": dialogue(row)}


def as_pair(row: Row) -> dict[str, Any]:
    return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}


def as_prompt(row: Row) -> dict[str, Any]:
    line = {"prompt": row.prompt, "gold": row.gold}
    return line | {"source": row.source, "reference": row.reference, "columns": row.columns} if row.kind == "verifiable" else line


# ------------------------------------------------------------------------------------------------------------- packed


@dataclass(frozen=True)
class Extract:
    """Some rows of a file of packed ones: where each begins and its size; and what makes a line of one."""

    packed: Path
    places: Sequence[tuple[int, int]]
    render: Render


@dataclass(frozen=True)
class Refused:
    """Rows for the quarantine, as in `Extract`, each with its reason; without one it is packed as its line."""

    packed: Path
    places: Sequence[tuple[int, int, str | None]]


def pack(row: Row) -> bytes:
    return pickle.dumps(tuple(vars(row).values()), pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes) -> Row:
    return Row(*pickle.loads(packed))


def lines_of(extract: Extract) -> bytes:
    """A line for each row, in the order of the places."""
    with extract.packed.open("rb") as file:
        rows = (unpack(os.pread(file.fileno(), size, start)) for start, size in extract.places)
        return "".join(json.dumps(extract.render(row), ensure_ascii=False) + "\n" for row in rows).encode()


def refused_lines(refused: Refused) -> bytes:
    """A line of quarantine.jsonl for each row, in the order of the places."""
    lines = []
    with refused.packed.open("rb") as file:
        for start, size, reason in refused.places:
            content = os.pread(file.fileno(), size, start)
            if reason is None:
                lines.append(content)
            else:
                row = unpack(content)
                lines.append(quarantine_line(Quarantined(row.source, row.file, row.line, reason, row.content)))
    return b"".join(lines)


def quarantine_line(row: Quarantined) -> bytes:
    try:
        line = json.dumps(vars(row), ensure_ascii=False, default=str)
    except RecursionError:  # what could just be read may be nested too deeply to be written
        line = json.dumps(vars(row) | {"row": None}, ensure_ascii=False)
    # backslashreplace writes what UTF-8 cannot say as \udcXX, which JSON reads back as it was
    return f"{line}\n".encode("utf-8", "backslashreplace")
