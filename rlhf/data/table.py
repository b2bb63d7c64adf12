"""All rows that were read, by number: a short entry for each is in memory, the rows themselves lie packed in a file."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.examine import ANSWERED, PAIR, PASSAGE, SWAPPED, Examined, catalogues
from rlhf.data.formats import BY_DESIGN
from rlhf.data.prepared import Extract, Refused, Render
from rlhf.data.split import Numbers
from rlhf.data.validate import place_of, repetition

# rlhf.data.examine.ENTRY
_DIGESTS = [("identity", "<u8", 2), ("key", "<u8", 2)]
_NUMBERS = [("category", "<u2"), ("form", "<u4"), ("unread", "<u4")]
ENTRY = np.dtype([("line", "<u8"), ("end", "<u8"), *_DIGESTS, ("state", "u1"), *_NUMBERS])
CHUNK = 1000


class Table:
    """Filled in the order of the rows; `close` ends that."""

    def __init__(self, packed: Path) -> None:
        self.packed = packed
        packed.parent.mkdir(parents=True, exist_ok=True)
        self._file = packed.open("wb")
        self._entries = bytearray()
        self._files: list[tuple[int, int, str]] = []  # number of its first row, number of its source, name
        self._catalogues = catalogues()

    def begin(self, source: int, file: str) -> None:
        """What follows is of this file."""
        self._files.append((len(self._entries) // ENTRY.itemsize, source, file))

    def add(self, examined: Examined) -> None:
        entries = np.frombuffer(examined.entries, ENTRY).copy()
        entries["end"] += self._file.tell()
        for name, values in examined.values.items():
            entries[name] = np.array([self._catalogues[name][value] for value in values])[entries[name]]
        self._entries += entries.tobytes()
        self._file.write(examined.packed)

    def close(self) -> None:
        """All rows are there: find out which say what an earlier one says."""
        self._file.close()
        self.entries = np.frombuffer(self._entries, ENTRY)
        starts = [start for start, _, _ in self._files]
        self.source = np.repeat(np.array([source for _, source, _ in self._files], np.int16), np.diff([*starts, len(self.entries)]))
        self.prompt = first_of(self.entries["key"])
        usable = np.flatnonzero(self.entries["category"] == 0)
        self.first = np.arange(len(self.entries))
        self.first[usable] = usable[first_of(self.entries["identity"][usable])]
        again = usable[self.first[usable] != usable]
        for same, same_source in ((False, False), (False, True), (True, False), (True, True)):
            chosen = (self._same(again) == same) & (self._same_source(again) == same_source)
            self.entries["category"][again[chosen]] = self._catalogues["category"][repetition(same, same_source, "").partition(":")[0]]

    def _same(self, rows: Numbers) -> NDArray[np.bool_]:
        state = self.entries["state"]
        return (state[rows] ^ state[self.first[rows]]) & SWAPPED == 0

    def _same_source(self, rows: Numbers) -> NDArray[np.bool_]:
        return self.source[rows] == self.source[self.first[rows]]

    # ------------------------------------------------------------------------------------------------------------ rows

    def good(self, source: int) -> Numbers:
        """The rows of a source that can be used."""
        return np.flatnonzero((self.source == source) & (self.entries["category"] == 0))

    def bad(self, source: int) -> Numbers:
        """The rows of a source that go to quarantine."""
        return np.flatnonzero((self.source == source) & (self.entries["category"] != 0))

    def reasons(self, rows: Numbers) -> dict[str, int]:
        """The categories of bad rows and how many each has, in the order of their first rows."""
        found, first, counts = np.unique(self.entries["category"][rows], return_index=True, return_counts=True)
        names = list(map(str, self._catalogues["category"]))
        return {names[found[place]]: int(counts[place]) for place in np.argsort(first)}

    def damaged(self, rows: Numbers) -> Numbers:
        """Those of bad rows that are not there by design."""
        designed = [number for name, number in self._catalogues["category"].items() if name in BY_DESIGN]
        return rows[~np.isin(self.entries["category"][rows], designed)]

    def unread(self, rows: Numbers) -> dict[str, int]:
        """Columns and fields of turns that nothing reads, by name, and how many of rows have them."""
        found, counts = np.unique(self.entries["unread"][rows], return_counts=True)
        fields: list[Any] = list(self._catalogues["unread"])
        having = Counter[str]()
        for number, count in zip(found, counts.tolist(), strict=True):
            having.update(dict.fromkeys(fields[number], count))
        return dict(sorted(having.items()))

    def first_of_each_form(self, rows: Numbers) -> Numbers:
        """The first of rows of each form that dialogues have."""
        forms, first = np.unique(self.entries["form"][rows], return_index=True)
        return rows[np.sort(first[forms != 0])]

    def passages(self, rows: Numbers) -> Numbers:
        """Those of rows that are text."""
        return rows[self.entries["state"][rows] & PASSAGE != 0]

    def dialogues(self, rows: Numbers) -> Numbers:
        """Those of rows that are not."""
        return rows[self.entries["state"][rows] & PASSAGE == 0]

    def pairs(self, rows: Numbers) -> Numbers:
        """Those of rows that are preference pairs."""
        return rows[self.entries["state"][rows] & PAIR != 0]

    def answered(self, rows: Numbers) -> Numbers:
        """Those of rows that hold a (better) answer."""
        return rows[self.entries["state"][rows] & ANSWERED != 0]

    def count(self, rows: Numbers, source: int) -> int:
        """How many of rows are of a source."""
        return int((self.source[rows] == source).sum())

    def place(self, row: int) -> tuple[str, int]:
        """File and line of a row."""
        file = bisect_right(self._files, row, key=lambda entry: entry[0]) - 1
        return self._files[file][2], int(self.entries["line"][row])

    # ----------------------------------------------------------------------------------------------------------- tasks

    def extracts(self, rows: Numbers, render: Render) -> Iterator[Extract]:
        """What `lines_of` makes the lines of these rows from."""
        for chunk in chunks(rows):
            yield Extract(self.packed, self._extents(chunk), render)

    def refused(self, rows: Numbers) -> Iterator[Refused]:
        """What `refused_lines` makes the lines of these rows from."""
        for chunk in chunks(rows):
            reasons = map(self._repetition, chunk.tolist())
            places = zip(self._extents(chunk), reasons, strict=True)
            yield Refused(self.packed, [(start, size, reason) for (start, size), reason in places])

    def _repetition(self, row: int) -> str | None:
        earlier = self.first[row]
        if earlier == row:
            return None
        pair = np.array([row])
        file, line = self.place(earlier)
        return repetition(bool(self._same(pair)), bool(self._same_source(pair)), place_of(line, file))

    def _extents(self, rows: Numbers) -> list[tuple[int, int]]:
        """Where each row begins in the file of packed ones, and its size."""
        ends = self.entries["end"]
        starts = np.where(rows > 0, ends[rows - 1], 0)
        return list(zip(starts.tolist(), (ends[rows] - starts).tolist(), strict=True))

    def __enter__(self) -> Table:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self.packed.unlink(missing_ok=True)


def chunks(rows: Numbers) -> Iterator[Numbers]:
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def first_of(digests: NDArray[np.uint64]) -> Numbers:
    """For each row the first one with its digest, by their numbers."""
    order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: of equal ones the first comes first
    there = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (there[1:] != there[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return first
