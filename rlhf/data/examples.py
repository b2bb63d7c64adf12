"""One row of each form that the dialogues have: what a chat template makes of the data, it shows on these."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf.data.fields import Turns
from rlhf.data.formats import Row

Form = tuple[tuple[str, ...], ...]  # of each turn: who speaks, and what it holds beside its text


def dialogue(row: Row) -> Turns:
    """The prompt and the (better) answer, where there is one."""
    if row.chosen is None:
        return row.prompt
    return (*row.prompt, {"role": "assistant", "content": row.chosen, **(row.beside or {})})


def form_of(row: Row) -> Form:
    """The form of a row; a passage has none."""
    if row.kind == "text":
        return ()
    return tuple((str(turn["role"]), *sorted(turn.keys() - {"role", "content", "weight"})) for turn in dialogue(row))


def first_of_each(rows: Iterable[Row]) -> dict[Form, Row]:
    """The first row of each form."""
    found: dict[Form, Row] = {}
    for row in rows:
        if form := form_of(row):
            found.setdefault(form, row)
    return found


def as_example(row: Row) -> dict[str, Any]:
    return {"row": f"{row.file}:{row.line}", "messages": dialogue(row)}
