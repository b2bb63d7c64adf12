"""Reading a source in batches: what a process finds in one of them, apart from all others."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.config.data import Source
from rlhf.data.examples import form_of
from rlhf.data.fields import Unparsed
from rlhf.data.formats import Quarantined, Row, Seen, rows_of
from rlhf.data.prepared import pack, quarantine_line
from rlhf.data.validate import digest_of, identity, key_of, text_problem

BATCH_ROWS, BATCH_BYTES = 1000, 4 << 20
# of a row: line, end among the packed rows, identity, key, state, and the numbers of its category, form and unread fields
ENTRY = struct.Struct("<QQ16s16sBHII")
SWAPPED, ANSWERED, PASSAGE, PAIR = 1, 2, 4, 8  # of its state
NO_DIGEST = bytes(16)


class Catalogue(dict[Hashable, int]):
    """Values and their numbers, in the order in which they first came; 0 stands for nothing."""

    def __missing__(self, value: Hashable) -> int:
        return self.setdefault(value, len(self))


def catalogues() -> dict[str, Catalogue]:
    """What an entry has numbers of: why the row is bad, the form of its dialogue, what of it nothing reads."""
    return {"category": Catalogue({"": 0}), "form": Catalogue({(): 0}), "unread": Catalogue({(): 0})}


@dataclass(frozen=True)
class Batch:
    """Some records of a file, in order."""

    source: Source
    file: str
    records: list[tuple[int, Any]]
    max_characters: int


@dataclass(frozen=True)
class Examined:
    """The rows of a batch: an entry for each, all of them packed, and by name of a catalogue the values that entries have numbers of."""

    entries: bytes
    packed: bytes
    values: dict[str, list[Hashable]]
    seen: Seen


def batches(source: Source, file: str, records: Unparsed, max_characters: int) -> Iterator[Batch]:
    """The records of a file in batches that a process can hold."""
    taken: list[tuple[int, Any]] = []
    size = 0
    for line, record in records:
        taken.append((line, record))
        size += len(record) if isinstance(record, bytes) else 0
        if len(taken) == BATCH_ROWS or size >= BATCH_BYTES:
            yield Batch(source, file, taken, max_characters)
            taken, size = [], 0
    if taken:
        yield Batch(source, file, taken, max_characters)


def examine(batch: Batch) -> Examined:
    """Parse and check each row of a batch by itself."""
    seen = Seen()
    return entered(rows_of(batch.source, batch.file, batch.records, seen), batch.max_characters, seen)


def entered(rows: Iterable[Row | Quarantined], max_characters: int, seen: Seen) -> Examined:
    """Check each of some rows by itself, and pack it."""
    entries, packed, numbers = bytearray(), bytearray(), catalogues()
    for found in rows:
        row = found
        if isinstance(row, Row) and (reason := text_problem(row, max_characters)):
            row = Quarantined(row.source, row.file, row.line, reason, row.content)
        if isinstance(row, Row):
            packed += pack(row)
            digest, swapped = identity(row)
            state = SWAPPED * swapped | ANSWERED * (row.chosen is not None) | PASSAGE * (row.kind == "text") | PAIR * (row.kind == "pairs")
            form, unread = numbers["form"][form_of(row)], numbers["unread"][row.unread]
            entries += ENTRY.pack(row.line, len(packed), digest, digest_of(key_of(row)), state, 0, form, unread)
        else:
            packed += quarantine_line(row)
            entries += ENTRY.pack(row.line, len(packed), NO_DIGEST, NO_DIGEST, 0, numbers["category"][row.category], 0, 0)
    return Examined(bytes(entries), bytes(packed), {name: list(catalogue) for name, catalogue in numbers.items()}, seen)
