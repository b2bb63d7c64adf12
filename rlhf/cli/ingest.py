"""`rlhf ingest`: files of new rows become dated parts of a source, checked against format and rows that are there, and versioned."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rlhf import config
from rlhf.config import Params
from rlhf.config.data import ColumnSource, NamedSource, VerifiableSource
from rlhf.data.folders import split_of
from rlhf.data.formats import BY_DESIGN, Quarantined, read
from rlhf.data.validate import Checker
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.paths import inside
from rlhf.workspace import presets

AnyFileSource = ColumnSource | VerifiableSource | NamedSource
# rows that a new file may well share with the ones there
KNOWN = BY_DESIGN | {"duplicate"}


@dataclass(frozen=True)
class Ingested:
    """What came in: the source, its new files, how many rows are new, and what was done, in lines for people."""

    source: str
    parts: list[str]
    rows: int
    lines: list[str]


def ingest(root: Path, params: Params, files: Sequence[Path], name: str | None) -> Ingested:
    """Add files to a source, all of them or none. A file with nothing new in it is left out.

    Args:
        root: the workspace.
        params: of the workspace.
        files: of the source's format.
        name: of the source; None where only one reads files.

    Raises:
        UserError: no such source or file, too many damaged rows (params: prepare.max_quarantined_share), or a flow is reading the data.
    """
    number, source = _source(params, name)
    key, folder = f"data.sources.{number}", presets.RAW / source.name
    busy = None if params.operations.when_busy == "queue" else f"{root}: a retraining flow is reading the data of this workspace"
    with lock(root, "flow", refuse=busy):
        if source.path is None or folder not in (Path(source.path), *Path(source.path).parents):
            what = f"{key}.path is {source.path}, and rows are added in {folder} only"
            raise UserError(
                what, remedy=f"bring the file there: `rlhf use params.yaml {key}.path=FILE`, FILE being a copy outside data/raw"
            )
        inside(root, folder, key)
        checker = Checker(params.prepare.max_characters)
        for _ in checker.checked(read(source, key, root, seed=0)):
            pass  # it knows them by their digests
        lines, taken = [], []
        for file in files:
            rows, said = _check(file, source, key, checker, params)
            lines.append(said)
            if rows:
                taken.append((file, rows))
        if not taken:
            return Ingested(source.name, [], 0, lines)
        parts: list[Path] = []
        try:
            for file, _ in taken:
                parts.append(place(root / folder, file))
                shutil.copyfile(file, parts[-1])
            if Path(source.path) == folder:
                lines.append(presets.version(root, folder))
            else:
                lines += presets.use(root, str(root / "params.yaml"), [f"{key}.path={folder}"])
        except BaseException:
            for part in parts:
                part.unlink(missing_ok=True)
            raise
        return Ingested(source.name, [str(folder / part.name) for part in parts], sum(rows for _, rows in taken), lines)


def _source(params: Params, name: str | None) -> tuple[int, AnyFileSource]:
    reading = {s.name: (number, s) for number, s in enumerate(params.data.sources) if isinstance(s, AnyFileSource) and s.path is not None}
    if name is None and len(reading) == 1:
        return next(iter(reading.values()))
    if name not in reading:
        what = "no source is named" if name is None else f"params.yaml: '{name}' is no source that reads a file"
        remedy = f"give --source, one of {', '.join(reading)}" if reading else "set one up with `rlhf use`, see docs/own-data.md"
        raise UserError(what, remedy=remedy)
    return reading[name]


def _check(file: Path, source: AnyFileSource, key: str, checker: Checker, params: Params) -> tuple[int, str]:
    """How many rows are new, and a line on the file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file", remedy="give the path of a data file")
    if source.hub_split is None and (split := split_of(Path(file.name))) != "train":
        what = f"{file}: by its name its rows are of the split '{split}'; nothing was added"
        raise UserError(what, remedy="rename it, if they are to be used like the other rows of the source")
    new, known, first = 0, Counter[str](), list[str]()
    for row in checker.checked(read(source.model_copy(update={"path": str(file.resolve())}), key, Path("/"), seed=0)):
        if isinstance(row, Quarantined):
            known[row.category] += 1
            if row.category not in KNOWN and len(first) < 3:
                first.append(f"line {row.line}: {row.reason}")
        else:
            new += 1
    total, damaged = new + known.total(), sum(count for category, count in known.items() if category not in KNOWN)
    if damaged > params.prepare.max_quarantined_share * total:
        what = f"{file}: {damaged} of {total} rows are damaged ({'; '.join(first)}); nothing was added"
        raise UserError(what, remedy="mend them, or raise prepare.max_quarantined_share")
    rest = "".join(f", {count} {category}" for category, count in sorted(known.items()))
    return new, f"{file}: {new} new rows{rest}"


def place(folder: Path, file: Path) -> Path:
    """A dated name that is free; names sort by time."""
    stamp = f"{datetime.now(UTC):%Y-%m-%dT%H%M%S}"
    place, number = folder / f"{stamp}-{file.name}", 1
    while place.exists():
        number += 1
        place = folder / f"{stamp}-{number}-{file.name}"
    return place


def bring_earlier(root: Path, params: Params) -> list[str]:
    """Answers of earlier versions, for those who learn from them; what was done, in lines for people.

    Raises:
        UserError: there are none (rlhf/registry/earlier.py).
    """
    if not params.warm_starts:
        return []
    from rlhf.registry import earlier  # MLflow and DVC take seconds, which others need not wait for

    return earlier.bring(root, params)


def renew_earlier(root: Path) -> list[str]:
    """The same once new rows are there, which stay, whatever comes of this."""
    try:
        return bring_earlier(root, config.load(root / "params.yaml"))
    except UserError as error:
        return [f"answers of earlier versions stay as they were: {error.what}"]
