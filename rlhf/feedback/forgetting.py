"""What a user asked and was told, outside of the record: in files, which `rlhf feedback forget` cleans or names."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, joinedload

from rlhf.feedback.database import folder
from rlhf.feedback.tables import Answer, Dialogue, Pair
from rlhf.job import read_lines, write_lines
from rlhf.workspace.presets import RAW

DATA = ("ratings", "corrections", "earlier")  # folders of raw data that ratings come to, and answers of earlier versions with them
INGESTING = "ingest-"  # how the name of a folder begins in which an ingest writes rows: a kill leaves it
Texts = Mapping[str, set[str]]  # by prompt, as JSON: answers to it, as they were given or edited


def knows_users(session: Session) -> bool:
    """Whether a user was named with any answer of the record."""
    return session.scalar(select(Answer.id).where(Answer.user.is_not(None)).limit(1)) is not None


def texts_of(session: Session, user: str) -> Texts:
    """What a user asked and was told, and what people made of it.

    Args:
        user: as recorded, a hash.
    """
    found: dict[str, set[str]] = defaultdict(set)
    asked = select(Answer.id).where(Answer.user == user)
    for answer in session.scalars(select(Answer).where(Answer.user == user).options(joinedload(Answer.opinions))).unique():
        edits = (opinion.edit for opinion in answer.opinions if opinion.edit)
        found[_key(answer.messages or [{"role": "user", "content": answer.prompt or ""}])] |= {answer.text, *edits}
    for pair in session.scalars(select(Pair).where(Pair.first_answer.in_(asked) | Pair.second_answer.in_(asked))):
        edits = (rating.edit for rating in pair.ratings if rating.edit)
        found[_key(pair.prompt)] |= {pair.first_text, pair.second_text, *edits}
    return found


def delete(root: Path, texts: Texts) -> int:
    """Delete the rows that were set aside as no pairs, and what a killed ingest left; how many rows."""
    for left in folder(root).glob(f"{INGESTING}*"):
        shutil.rmtree(left)
    gone = 0
    for path, lines in _found(folder(root) / "undecided", texts):
        kept = [row for number, row in enumerate(read_lines(path), start=1) if number not in lines]
        if kept:
            beside = path.with_suffix(".new")
            write_lines(beside, kept)
            beside.replace(path)
        else:
            path.unlink()
        gone += len(lines)
    return gone


def data(root: Path, texts: Texts) -> list[tuple[Path, list[int]]]:
    """Files of raw data that hold some of it, with the numbers of their lines."""
    return [(path.relative_to(root), lines) for name in DATA for path, lines in _found(root / RAW / name, texts)]


def _found(place: Path, texts: Texts) -> Iterator[tuple[Path, list[int]]]:
    for path in sorted(place.rglob("*.jsonl")):
        with path.open("rb") as file:
            lines = [number for number, line in enumerate(file, start=1) if _holds(line, texts)]
        if lines:
            yield path, lines


def _holds(line: bytes, texts: Texts) -> bool:
    """Whether a line is a row of one of the prompts, with an answer to it; what people put there may be in any form."""
    try:
        row = json.loads(line)
        *turns, last = row.get("messages") or [*row["prompt"], {"content": None}]
        said = [last["content"], *row.get("answers", ()), *(row.get(name) for name in ("chosen", "rejected", "answer"))]
        return not texts.get(_key(turns), set()).isdisjoint(said)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def _key(prompt: Dialogue | list[Any]) -> str:
    return json.dumps(prompt, sort_keys=True)
