"""The writer of answers: nobody waits for it, whatever the database does, and what it cannot keep is counted."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from rlhf.errors import UserError
from rlhf.feedback import recorder
from rlhf.feedback.database import Database, Kept
from rlhf.feedback.recorder import Recorder
from rlhf.feedback.tables import Answer, Opinion
from tests.feedback.test_tables import pair, rating

REPOSITORY = Path(__file__).resolve().parents[2]


def row(reply: str, **more: Any) -> dict[str, Any]:
    return {
        "reply": reply,
        "choice": 0,
        "at": datetime.now(UTC),
        "messages": [{"role": "user", "content": "Wer?"}],
        "text": "Ich.",
        "asked": "assistant",
        "version": "assistant/1",
        "digest": "",
        "sampling": {},
        "seed": 1,
        "finish": "stop",
        "prompt_tokens": 3,
        "answer_tokens": 2,
        "seconds": 0.1,
        "user": None,
    } | more


def replies(place: str) -> list[str]:
    with Database(place).reading() as session:
        return sorted(session.scalars(select(Answer.reply)))


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def made(place: str, *names: str) -> None:
    record = Database(place)
    with record.writing() as session:
        session.add_all([Answer(**row(name)) for name in names])
    record.close()


def test_answers_are_written_once_and_at_the_end_all_of_them(place: str) -> None:
    found = Recorder(Kept(lambda: Database(place)))
    for number in (*range(500), *range(10)):
        found.put(row(f"{number:03}"))
    found.stop()
    assert replies(place) == [f"{number:03}" for number in range(500)]
    assert (found.dropped, found.waiting, found.problem) == (0, 0, None)


def test_a_locked_database_holds_up_nobody(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.feedback.database.SECONDS_TO_WAIT", 0.1)
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    Database(place).close()
    found = Recorder(Kept(lambda: Database(place)), most=5)
    other = sqlite3.connect(tmp_path / "feedback.db")
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    found.put(row("0"))
    until(lambda: found.problem)
    assert "locked" in str(found.problem)
    for number in range(1, 10):
        found.put(row(str(number)))
    assert time.monotonic() - began < 5
    assert found.dropped == 4
    other.rollback()
    until(lambda: found.written == 6)
    found.stop()
    assert replies(place) == list("012345")


def test_a_database_that_is_not_there_is_waited_for(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    away = [True]

    def connect() -> Database:
        if away:
            raise UserError("it is away", remedy="wait")
        return Database(place)

    found = Recorder(Kept(connect))
    found.put(row("0"))
    until(lambda: found.problem)
    away.clear()
    found.stop()
    assert replies(place) == ["0"]


def test_a_damaged_file_is_waited_for_and_told_of(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    found = Recorder(Kept(lambda: Database(place)))
    found.put(row("0"))
    until(lambda: found.written)
    with closing(sqlite3.connect(tmp_path / "feedback.db")) as other:  # so that all of it is in the file, and nothing in the log of writes
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = (tmp_path / "feedback.db").read_bytes()
    with (tmp_path / "feedback.db").open("r+b") as file:
        file.write(b"no database" * 1000)
    found.put(row("1"))
    until(lambda: found.problem or found.dropped)
    assert "not a database" in str(found.problem) or "malformed" in str(found.problem)
    with (tmp_path / "feedback.db").open("r+b") as file:
        file.write(whole)
    found.stop()


def test_what_never_comes_is_given_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_FLUSH", 0.3)

    def connect() -> Database:
        raise UserError("it is away", remedy="wait")

    found = Recorder(Kept(connect))
    for number in range(3):
        found.put(row(str(number)))
    found.stop()
    assert found.dropped == 3


def test_a_row_that_no_table_takes_takes_no_other_with_it(place: str) -> None:
    found = Recorder(Kept(lambda: Database(place)))
    for each in (row("0"), row("1", seed=None), row("2", prompt_tokens=object()), row("3", text="a\ud800")):
        found.put(each)
    found.stop()
    assert (replies(place), found.dropped) == (["0", "3"], 2)


def test_a_user_is_forgotten_to_the_last_byte(place: str, tmp_path: Path) -> None:
    record = Database(place)
    with record.writing() as session:
        session.add_all([Answer(**row("0", user="u", text="unforgettable" * 1000)), Answer(**row("1", user="v"))])
        session.flush()
        texts = {"first_text": "unforgettable", "second_text": "memorable"}
        session.add_all([pair("one", first_answer=1, **texts), pair("two", second_answer=2), Opinion(token="o", answer_id=1, thumb=1)])
        session.flush()
        session.add_all([rating("t1", 1, edit="unforgettable"), rating("t2", 2), pair("again", repeat_of=1)])
    assert record.forget("u") == {"answers": 1, "opinions": 1, "pairs": 2, "ratings": 1}
    assert record.forget("u") == {"answers": 0, "opinions": 0, "pairs": 0, "ratings": 0}
    assert replies(place) == ["1"]
    assert not [path for path in tmp_path.iterdir() if b"unforgettable" in path.read_bytes()]


def test_who_reads_on_keeps_texts_from_being_overwritten_and_that_is_said(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.feedback.database.SECONDS_TO_WAIT", 0.1)
    record = Database(place)
    with record.writing() as session:
        session.add(Answer(**row("0", user="u", text="unforgettable")))
    reader = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM answers").fetchall()
    with pytest.raises(UserError, match="until they end"):
        record.forget("u")
    reader.close()
    assert record.forget("u")["answers"] == 0
    assert not [path for path in tmp_path.iterdir() if b"unforgettable" in path.read_bytes()]


def test_a_shadow_of_what_was_forgotten_is_not_recorded(place: str) -> None:
    record = Recorder(Kept(lambda: Database(place)))
    record.put(row("one", correlation="one", user="u", shadow=False))
    record.put(row("shadow-one", correlation="one", user="u", shadow=True))
    record.put(row("two", correlation="two", user="v", shadow=False))
    until(lambda: record.written == 3)
    assert Database(place).forget("u")["answers"] == 2
    for number, correlation in enumerate(("one", "two", "two")):
        record.put(row(f"late-{number}", correlation=correlation, user="u", shadow=True))
    record.stop()
    assert replies(place) == ["late-1", "late-2", "two"]
    assert (record.written, record.dropped) == (5, 0)


def test_an_answer_is_deleted_after_its_days_unless_somebody_spoke_of_it_or_is_to_rate_it(place: str) -> None:
    database, old = Database(place), datetime.now(UTC) - timedelta(days=8)
    with database.writing() as session:
        session.add_all(
            Answer(**row(name, at=at)) for name, at in (("old", old), ("new", datetime.now(UTC)), ("told", old), ("paired", old))
        )
        session.flush()
        found = {answer.reply: answer.id for answer in session.scalars(select(Answer))}
        session.add(Opinion(token="t", answer_id=found["told"], thumb=1))
        session.add(pair("p", first_answer=found["paired"]))
    writer = Recorder(Kept(lambda: Database(place)), days=7)
    until(lambda: replies(place) == ["new", "paired", "told"])
    writer.stop()
    assert writer.problem is None
