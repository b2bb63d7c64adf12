"""Readers: every format of every kind of file becomes one `Row` per line, or a `Quarantined` that says what is wrong with it.

A bad row never stops the reading; a file that cannot be read at all does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.data import Columns, ColumnSource, FileSource, NamedSource, SandboxSource, Source, VerifiableSource
from rlhf.data import verifiable
from rlhf.data.fields import BadRow, Fields, Record, Turn, Turns, Unparsed, Unreadable, check_texts, string
from rlhf.data.jsons import of_line, parsed
from rlhf.data.named import DATASETS
from rlhf.data.records import parts_of, records_of
from rlhf.data.sandbox import make_rows
from rlhf.data.turns import answered, complete, demonstration, last_answer, left_over, plain, turns, turns_or_question
from rlhf.errors import UserError

# Categories of rows that are there by design, and say nothing of damage: datasets hold them, and datasets overlap.
BY_DESIGN = frozenset({"tie", "no answer", "no pair", "undesirable", "in another source"})


@dataclass(frozen=True)
class Row:
    """One row of a source. A dialogue is its prompt, ending in a user turn, and the answers to it; a text row has only its text."""

    source: str
    file: str
    line: int
    kind: str
    prompt: Turns = ()
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    gold: dict[str, Any] | None = None
    beside: dict[str, Any] | None = None  # what the answer holds beside its text: calls of tools, thoughts
    unread: tuple[str, ...] = ()  # columns and fields of turns that nothing reads
    reference: Any = None  # of a verifiable row: what is right
    columns: dict[str, Any] | None = None  # and what else reward functions get

    @property
    def content(self) -> dict[str, Any]:
        """What makes the row the same as another one."""
        fields = {"prompt": self.prompt or None, "chosen": self.chosen, "rejected": self.rejected, "text": self.text, "beside": self.beside}
        fields |= {"reference": self.reference}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Quarantined:
    """A row that no stage may see. The reason is a category, where useful followed by a colon and details."""

    source: str
    file: str
    line: int
    reason: str
    row: Any

    @property
    def category(self) -> str:
        return self.reason.partition(":")[0]


# ------------------------------------------------------------------------------------------------------------- sources

_SANDBOX_COLUMNS = Columns(
    prompt="prompt", chosen="chosen", rejected="rejected", messages="messages", question="question", answer="answer", text="text"
)


def read(source: Source, key: str, root: Path, seed: int) -> Iterator[Row | Quarantined]:
    """The rows of a source, in order, good and bad.

    Args:
        source: an entry of data.sources.
        key: where it stands in params.yaml, for example ``data.sources.0``.
        root: what a relative path starts from.
        seed: of a sandbox source's rows.

    Raises:
        UserError: the file or hub dataset cannot be read, holds no rows, or a column is missing from every row.
    """
    for file, records in files_of(source, key, root, seed):
        seen = Seen()
        yield from rows_of(source, file, records, seen)
        seen.check(source, key, file)


def files_of(source: Source, key: str, root: Path, seed: int) -> Iterator[tuple[str, Unparsed]]:
    """The files of a source, in order, each with its records, which become one row each.

    Raises:
        UserError: one cannot be read; also as its records are taken.
    """
    if isinstance(source, SandboxSource):
        yield "sandbox", enumerate(make_rows(source.kind, source.rows, seed, source.label_noise, source.kinds), start=1)
        return
    gather = DATASETS[source.format].gather if isinstance(source, NamedSource) else None
    for part in parts_of(source, key, root) or [source]:
        records = records_of(part, key, root)
        yield part.path or f"{part.hub}@{part.revision}", gather(parsed(records)) if gather else records


@dataclass
class Seen:
    """What stood in the records of a file, or of a part of it."""

    records: int = 0
    missing: Counter[str] = field(default_factory=Counter)  # keys of columns in params.yaml: how many records have no such column
    present: dict[str, None] = field(default_factory=dict)

    def add(self, further: Seen) -> None:
        """Count the next part of the file in."""
        self.records += further.records
        self.missing.update(further.missing)
        self.present.update(further.present)

    def check(self, source: Source, key: str, file: str) -> None:
        """Check what only a whole file shows.

        Raises:
            UserError: it holds no rows, or a column is missing from every row.
        """
        if not self.records:
            raise UserError(f"{key}: {file} holds no rows", remedy="give a file with rows, or take the source out of params.yaml")
        needed, _ = _reader(source)
        if gone := [name for name in needed if self.missing[name] == self.records]:
            columns = ", ".join(repr(needed[name]) for name in gone)
            whole = '; read was one row alone: rows are lines, a list, or an object {"data": [...]}' if self.records == 1 else ""
            raise UserError(
                f"{key}: no row of {file} has a column {columns}; its columns are {', '.join(map(repr, self.present))}{whole}",
                remedy=f"{self._named(key, {name: needed[name] for name in gone})} in params.yaml, or another format"
                if isinstance(source, ColumnSource | VerifiableSource)
                else f"set another {key}.format in params.yaml",
            )

    def _named(self, key: str, gone: Mapping[str, str]) -> str:
        """What to set for columns that are not there; one that is may differ from it in capitals alone."""
        alike = {column.lower(): column for column in self.present}
        values = {name: alike.get(column.lower()) for name, column in gone.items()}
        return "set " + ", ".join(f"{key}.columns.{name}" + (f"={value}" if value else "") for name, value in values.items())


def rows_of(source: Source, file: str, records: Unparsed, seen: Seen) -> Iterator[Row | Quarantined]:
    """The rows of a file, or of a part of it, good and bad. They are counted in `seen`."""
    needed, parse = _reader(source)
    for line, found in records:
        record = of_line(found) if isinstance(found, bytes) else found
        if record is None:
            continue
        seen.records += 1
        raw = record.raw if isinstance(record, Unreadable) else record
        plain_ascii = isinstance(found, bytes) and found.isascii() and b"\\u" not in found
        try:
            if not plain_ascii:
                check_texts(raw)
            if isinstance(record, Unreadable):
                raise BadRow(record.reason)
            seen.present.update(dict.fromkeys(record))
            if absent := [name for name, column in needed.items() if column not in record]:
                seen.missing.update(absent)
                raise BadRow(f"malformed: no column '{needed[absent[0]]}'")
            gold = None if isinstance(source, FileSource) else record.get("gold")
            yield Row(source.name, file, line, source.kind, gold=gold, **_fields(source, record, needed.values(), parse))
        except (BadRow, RecursionError) as reason:
            deep = isinstance(reason, RecursionError)  # nor can it be written
            yield Quarantined(source.name, file, line, "malformed: nested too deeply" if deep else str(reason), None if deep else raw)


def _fields(source: Source, record: Record, columns: Collection[str], parse: Callable[[Record], Fields]) -> Fields:
    """All that a record says. Of a public dataset it is known what its other columns are."""
    fields = parse(record)
    if isinstance(source, SandboxSource):
        return fields
    fields = complete(record, fields, columns)
    unread = left_over(record, columns) if isinstance(source, ColumnSource) and len(record) > len(columns) else []
    return fields | {"unread": (*fields.get("unread", ()), *unread)} if unread else fields


# ------------------------------------------------------------------------------------------------------------- formats


def _side(record: Record, column: str, prompt: Turns | None) -> tuple[Turns, Turn]:
    """The prompt and an answer to it, out of a column that holds the answer, its turn or the whole dialogue."""
    if prompt is not None and isinstance(record[column], str):
        return prompt, {"role": "assistant", "content": record[column].strip()}
    before, answer = last_answer(turns(record, column), column)
    if prompt is None:
        return before, answer
    if before not in ((), prompt):
        raise BadRow(f"malformed: '{column}' is a dialogue that does not begin with the prompt")
    return prompt, answer


def _pair(record: Record, columns: Columns, prompt_column: str | None) -> Fields:
    prompt = None if prompt_column is None else turns_or_question(record, prompt_column)
    try:
        before, chosen = _side(record, columns.chosen, prompt)
    except BadRow as reason:
        if prompt is None and isinstance(record.get("prompt"), str):
            raise BadRow(f"{reason}; for the question in 'prompt' set format: pairs and columns.prompt: prompt") from None
        raise
    before_rejected, rejected = _side(record, columns.rejected, prompt)
    if before != before_rejected:
        raise BadRow("malformed: chosen and rejected differ before the last answer")
    if "weight" in chosen:
        raise BadRow(f"no answer: '{columns.chosen}' is marked as not to be learnt")
    return {"prompt": before, "chosen": plain(chosen, columns.chosen), "rejected": plain(rejected, columns.rejected)}


def _exchange(record: Record, columns: Columns) -> Fields:
    prompt, answer = _side(record, columns.answer, turns_or_question(record, columns.question))
    if "weight" in answer:
        raise BadRow(f"no answer: '{columns.answer}' is marked as not to be learnt")
    return {"prompt": prompt, **answered(answer)}


# name: the columns that it reads, and how
_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record, Columns], Fields]]] = {
    "hh": (("chosen", "rejected"), lambda record, columns: _pair(record, columns, None)),
    "pairs": (("prompt", "chosen", "rejected"), lambda record, columns: _pair(record, columns, columns.prompt)),
    "messages": (("messages",), lambda record, columns: demonstration(turns(record, columns.messages), columns.messages)),
    "qa": (("question", "answer"), _exchange),
    "prompts": (("prompt",), lambda record, columns: {"prompt": turns_or_question(record, columns.prompt or "prompt")}),
    "text": (("text",), lambda record, columns: {"text": string(record, columns.text)}),
}


def _reader(source: Source) -> tuple[dict[str, str], Callable[[Record], Fields]]:
    """The columns that a source must have, by their keys in params.yaml; and what makes the fields of a row out of a record."""
    if isinstance(source, NamedSource):
        dataset = DATASETS[source.format]
        return {column: column for column in dataset.columns}, dataset.parse
    if isinstance(source, VerifiableSource):
        prompt, reference = source.columns.prompt, source.columns.reference
        return {"prompt": prompt, "reference": reference}, lambda record: verifiable.general(record, prompt, reference)
    if source.kind == "verifiable":
        return {}, lambda record: {name: record[name] for name in ("prompt", "reference", "columns")}
    columns = source.columns if isinstance(source, ColumnSource) else _SANDBOX_COLUMNS
    names, parse = _FORMATS[source.format if isinstance(source, ColumnSource) else source.kind]
    given = {name: getattr(columns, name) for name in names}
    return {name: column for name, column in given.items() if column is not None}, lambda record: parse(record, columns)
