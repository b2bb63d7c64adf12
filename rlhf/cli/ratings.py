"""`rlhf ingest --feedback`: ratings that are new become dated parts of the sources `ratings` and `corrections`, each of them once."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.cli import ingest as adding
from rlhf.cli.ingest import Ingested
from rlhf.config import Params
from rlhf.config.data import SLICES, Columns, ColumnSource, Split
from rlhf.data.formats import Quarantined, read
from rlhf.data.validate import text_problem
from rlhf.errors import UserError
from rlhf.feedback import database
from rlhf.feedback.database import Database
from rlhf.feedback.export import Exported, export
from rlhf.feedback.forgetting import INGESTING
from rlhf.feedback.tables import TAKING, Opinion, Rating, now
from rlhf.feedback.verdicts import Judged, agreement
from rlhf.job import write_lines
from rlhf.locks import lock
from rlhf.workspace import presets

# name of a source: what it is made of, its format, the slice that it feeds where params.yaml does not have it yet
SOURCES = {"ratings": ("pairs", "pairs", "reward"), "corrections": ("demonstrations", "messages", "sft")}
COLUMNS = {name: name for name in Columns.model_fields}


def ingest(root: Path, params: Params) -> list[Ingested]:
    """Take the ratings of all pairs that are complete, edited answers, and those of applications.

    Returns:
        What came in, for each source that got rows; what is no pair is told in lines, and kept in feedback/undecided.

    Raises:
        UserError: raters agree too little, or the rows cannot be added (`rlhf.cli.ingest`).
    """
    record = database.connect(root, params)
    with closing(record), lock(root, "ingest", refuse=f"{root}: ratings are being ingested already"):
        with record.writing() as session:
            found = export(session, params.feedback.ratings, new=True)
            for rating in found.ratings:
                rating.ingested = TAKING  # from now on none of them is undone
        done: list[Ingested] = []
        try:
            check_agreement(found.pairs, params)
            _add(root, params, found, done)
        except BaseException:
            if not done:  # else they are data in part, and are taken again the next time, as after a kill
                _note(record, found, None)
            raise
        _note(record, found, now())
    return done


def _add(root: Path, params: Params, found: Exported, done: list[Ingested]) -> None:
    folder = database.folder(root)
    folder.mkdir(mode=0o700, exist_ok=True)  # the record may be elsewhere
    with tempfile.TemporaryDirectory(dir=folder, prefix=INGESTING) as scratch:
        for source, (kind, _, _) in SOURCES.items():
            file = Path(scratch) / f"{source}.jsonl"
            if _written(found, kind, file, params):
                done.append(_added(root, params, source, file))
                params = config.load(root / "params.yaml")
    if found.rows["undecided"]:
        done.append(_set_aside(root, found))


def check_agreement(pairs: list[Judged], params: Params) -> None:
    """Refuse ratings of people who do not agree.

    Raises:
        UserError: Krippendorff's alpha is below feedback.min_agreement, or cannot be told.
    """
    bound = params.feedback.min_agreement
    if bound is None or not pairs:
        return
    found = agreement(pairs, params.seed)
    if found is None:
        what = f"how far raters agree cannot be told: no two of them rated the same of {len(pairs)} pairs with different results"
        raise UserError(what, remedy="raise feedback.ratings to 2 or more, or set feedback.min_agreement to null")
    if found.alpha < bound:
        said = f"Krippendorff's alpha of {found.pairs} pairs is {found.alpha:.3f} ({found.low:.3f} to {found.high:.3f})"
        what = f"raters agree too little: {said}, and feedback.min_agreement is {bound:g}; nothing was added"
        raise UserError(what, remedy="see each rater's figures (`rlhf feedback figures`) and what they were told, or lower the bound")


def _written(found: Exported, kind: str, file: Path, params: Params) -> bool:
    """Write the rows of a kind; whether there are any. Those that no stage takes go to what is no pair: they would hold up all others.

    An application may send two turns of the user after each other, or an empty one, and a model may answer nothing.
    """
    rows, good = found.rows[kind], []
    if rows:
        write_lines(file, rows)
        form: Any = next(form for own, form, _ in SOURCES.values() if own == kind)
        place = {"path": str(file), "hub": None, "revision": None, "hub_split": None}
        split = Split(**dict.fromkeys(SLICES, 1.0))
        source = ColumnSource(name=kind, format=form, columns=Columns(**COLUMNS), split=split, weight=1.0, **place)
        for row, said in zip(rows, read(source, kind, file.parent, params.seed), strict=True):
            reason = said.reason if isinstance(said, Quarantined) else text_problem(said, params.prepare.max_characters)
            if reason:
                found.rows["undecided"].append(row | {"decision": f"not usable ({reason})"})
            else:
                good.append(row)
        write_lines(file, good)
    return bool(good)


def _added(root: Path, params: Params, name: str, file: Path) -> Ingested:
    """Add a file to a source, which becomes one of params.yaml where it is none."""
    if any(source.name == name for source in params.data.sources):
        return adding.ingest(root, params, [file], name)
    _, form, feeds = SOURCES[name]
    folder = presets.RAW / name
    busy = None if params.operations.when_busy == "queue" else f"{root}: a retraining flow is reading the data of this workspace"
    with lock(root, "flow", refuse=busy):
        part = adding.place(root / folder, file)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(file.read_bytes())
        source: dict[str, Any] = {"name": name, "path": str(folder), "hub": None, "revision": None, "hub_split": None, "format": form}
        source |= {"columns": COLUMNS, "split": {slice_name: int(slice_name == feeds) for slice_name in SLICES}, "weight": 1}
        key = f"data.sources.{len(params.data.sources)}"
        try:
            presets.use(root, str(root / "params.yaml"), [f"{key}={json.dumps(source)}"])
        except BaseException:
            part.unlink()
            raise
    rows = len(file.read_bytes().splitlines())
    said = [f"{key} of params.yaml is the new source '{name}', which feeds {feeds}", f"{name}: {rows} new rows"]
    return Ingested(name, [str(folder / part.name)], rows, said)


def _set_aside(root: Path, found: Exported) -> Ingested:
    """Keep what is no pair where it is seen, and out of the data."""
    rows = found.rows["undecided"]
    part = adding.place(database.folder(root) / "undecided", Path("undecided.jsonl"))
    write_lines(part, rows)
    said = found.lines[list(found.rows).index("undecided")].partition(": ")[2]
    return Ingested("undecided", [], 0, [f"no pairs: {said}, kept in {part}"])


def _note(record: Database, found: Exported, at: datetime | None) -> None:
    """Each rating becomes data once; after a kill before this, the rows are there already, and are passed over.

    Args:
        at: when they became data; None: they did not.
    """
    with record.writing() as session:
        ratings = [session.get(Rating, one.id) for one in found.ratings]
        opinions = [session.get(Opinion, one.id) for one in found.opinions]
        for one in (*ratings, *opinions):
            if one is not None:  # else its user was forgotten meanwhile
                one.ingested = at
