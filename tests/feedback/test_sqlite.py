"""The record's file goes, or another one comes in its place: each keeps what is its own, and the record is there again."""

from __future__ import annotations

import gc
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from itertools import count
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from rlhf import config
from rlhf.errors import UserError
from rlhf.feedback import database, recorder
from rlhf.feedback.database import Database, Kept
from rlhf.feedback.recorder import Recorder
from rlhf.feedback.tables import Answer
from tests.feedback.test_recorder import made, replies, row, until

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_file_that_was_deleted_is_made_anew(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    found, numbers = Recorder(Kept(lambda: Database(place))), count()
    found.put(row("first"))
    until(lambda: found.written)
    for file in tmp_path.glob("feedback.db*"):
        file.unlink()

    def is_written() -> bool:
        found.put(row(str(next(numbers))))
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(tmp_path / "feedback.db")) as other:
            return bool(other.execute("SELECT count(*) FROM answers").fetchone()[0])
        return False

    until(is_written)
    found.stop()
    assert "first" not in replies(place)


def test_a_file_with_other_tables_in_its_place_is_left_as_it_is(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    other = f"{place}-other"
    Database(other).close()
    with closing(sqlite3.connect(tmp_path / "feedback.db-other")) as made, made:
        made.execute("UPDATE layout SET number = 99")
    found = Recorder(Kept(lambda: Database(place)))
    found.put(row("first"))
    until(lambda: found.written)
    (tmp_path / "feedback.db").rename(tmp_path / "aside")
    for log in ("feedback.db-wal", "feedback.db-shm"):
        (tmp_path / log).rename(tmp_path / log.replace("feedback.db", "aside"))
    (tmp_path / "feedback.db-other").rename(tmp_path / "feedback.db")
    found.put(row("second"))
    until(lambda: "layout 99" in str(found.problem))
    with closing(sqlite3.connect(tmp_path / "feedback.db")) as made:
        assert made.execute("SELECT count(*) FROM answers").fetchone() == (0,)
        made.execute("UPDATE layout SET number = 1").connection.commit()
    found.stop()
    assert replies(place) == ["second"]


@pytest.mark.parametrize("at_work", [False, True])
def test_a_backup_takes_the_place_and_each_file_keeps_what_is_its_own(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_work: bool
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    made(f"{place}-backup", *(f"backup-{number:03}" for number in range(300)))
    found = Recorder(Kept(lambda: Database(place)))
    names = [f"first-{number:03}" for number in range(300)]
    for name in names:
        found.put(row(name))
    until(lambda: found.written == len(names))
    assert (tmp_path / "feedback.db-wal").stat().st_size > 0  # not all that was acknowledged is in the file itself
    (tmp_path / "feedback.db").rename(tmp_path / "aside")  # as an operator does who knows nothing of logs
    (tmp_path / "feedback.db-backup").rename(tmp_path / "feedback.db")
    if at_work:
        found.put(row("then"))
    else:  # it is noticed all the same, before somebody opens the one with the other's log
        until(lambda: not (tmp_path / "feedback.db-wal").exists())
        found.put(row("then"))
    found.stop()
    assert replies(place) == [*(f"backup-{number:03}" for number in range(300)), "then"]
    assert replies(f"sqlite:///{tmp_path / 'aside'}") == names


def test_whoever_waits_for_a_record_that_cannot_be_opened_waits_once() -> None:
    tried, together = list[float](), threading.Barrier(4)

    def refuse() -> Database:
        tried.append(time.monotonic())
        time.sleep(3)
        raise UserError("it is locked", remedy="wait")

    def use() -> str:
        together.wait()
        with pytest.raises(UserError) as refused:
            kept.get()
        return refused.value.what

    kept = Kept(refuse)
    with ThreadPoolExecutor(4) as pages:
        assert {page.result() for page in [pages.submit(use) for _ in range(4)]} == {"it is locked"}
    assert len(tried) == 1
    with pytest.raises(UserError):  # who comes later tries again
        kept.get()
    assert len(tried) == 2


@pytest.mark.parametrize("used", [False, True])
def test_a_file_that_is_replaced_while_somebody_reads_loses_nothing(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, used: bool
) -> None:
    made(f"{place}-backup", "backup")
    kept = Kept(lambda: Database(place))
    found = Recorder(kept)
    record = kept.get()  # as pages do: the recorder itself has written nothing yet
    reader = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    with record.writing() as session:
        session.add(Answer(**row("first")))
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM answers").fetchall()
    with record.writing() as session:
        session.add_all([Answer(**row(f"{number:03}", text="x" * 500)) for number in range(50)])
    with record.reading() if used else nullcontext() as own:  # the only connection is in use
        if own:
            own.scalars(select(Answer.reply)).all()
        (tmp_path / "feedback.db").rename(tmp_path / "aside")
        (tmp_path / "feedback.db-backup").rename(tmp_path / "feedback.db")
        until(lambda: not (tmp_path / "feedback.db-wal").exists())
        with kept.get().reading() as session:
            assert session.scalars(select(Answer.reply)).all() == ["backup"]
    found.stop()
    reader.close()
    (left,) = tmp_path.glob("feedback.db.*-wal")
    assert left.name in caplog.text
    left.rename(tmp_path / "aside-wal")
    assert replies(f"sqlite:///{tmp_path / 'aside'}") == [*(f"{number:03}" for number in range(50)), "first"]
    assert replies(place) == ["backup"]


def test_a_folder_that_may_not_be_looked_into_ends_no_recorder(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    found = Recorder(Kept(lambda: Database(place)))
    found.put(row("first"))
    until(lambda: found.written)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        patch.setattr(Path, "unlink", refuse)
        time.sleep(0.5)  # it looks a few times
    found.put(row("second"))
    until(lambda: found.written == 2)
    found.stop()
    assert replies(place) == ["first", "second"]


def refuse(*_: object, **__: object) -> None:
    raise PermissionError


def test_what_cannot_be_opened_holds_no_file(place: str, tmp_path: Path) -> None:
    made(place)
    with closing(sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)) as other:
        other.execute("UPDATE layout SET number = 99")
        before = psutil.Process().num_fds()
        gc.disable()
        for _ in range(20):
            with pytest.raises(UserError):
                Database(place)
        gc.enable()
        assert psutil.Process().num_fds() <= before + 3


def test_a_log_that_was_deleted_costs_nothing(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    found = Recorder(Kept(lambda: Database(place)))
    found.put(row("first"))
    until(lambda: found.written)
    (tmp_path / "feedback.db-wal").unlink()
    (tmp_path / "feedback.db-shm").unlink()
    found.put(row("second"))
    found.stop()
    assert replies(place) == ["first", "second"]


@pytest.mark.parametrize("wrong", ["a folder", "nothing where a folder is to be"])
def test_a_place_that_no_file_can_be_in_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setattr(recorder, "SECONDS_TO_WAIT", 0.1)
    params = config.load(REPOSITORY / "params.yaml")
    if wrong == "a folder":
        (tmp_path / "feedback/feedback.db").mkdir(parents=True)
    else:
        (tmp_path / "feedback").touch()
    with pytest.raises(UserError, match="cannot be opened"):
        database.connect(tmp_path, params)
    found = Recorder(Kept(lambda: database.connect(tmp_path, params)))
    found.put(row("first"))
    until(lambda: found.problem)
    if wrong == "a folder":
        (tmp_path / "feedback/feedback.db").rmdir()
    else:
        (tmp_path / "feedback").unlink()
    found.stop()
    assert replies(f"sqlite:///{tmp_path / 'feedback/feedback.db'}") == ["first"]


def test_what_is_written_as_the_file_goes_is_not_acknowledged(place: str, tmp_path: Path) -> None:
    made(f"{place}-other", "other")
    record = Database(place)

    def write() -> None:
        with record.writing() as session:
            session.add(Answer(**row("first")))
            session.flush()
            (tmp_path / "feedback.db-other").replace(tmp_path / "feedback.db")
            with pytest.raises(UserError, match="replaced"):  # with a connection of its own, and not of the new file
                record.engine.connect()

    with pytest.raises(UserError, match="replaced"):
        write()
    record.close()
    assert replies(place) == ["other"]


def test_a_file_of_something_else_is_not_touched(place: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "feedback.db")) as other, other:
        other.execute("CREATE TABLE mine (a)")
    before = (tmp_path / "feedback.db").read_bytes()
    with pytest.raises(UserError, match=r"other tables .*\(mine\)"):
        Database(place)
    made(f"{place}-99", "other")
    with closing(sqlite3.connect(tmp_path / "feedback.db-99")) as other, other:
        other.execute("UPDATE layout SET number = 99")
        other.commit()
        other.execute("PRAGMA journal_mode = DELETE")
    later = (tmp_path / "feedback.db-99").read_bytes()
    with pytest.raises(UserError, match="layout 99"):
        Database(f"{place}-99")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [before, later]


def test_a_record_in_memory_or_by_a_uri_is_opened_and_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made("sqlite://")
    made("sqlite:///file:own.db?uri=true", "first")
    assert replies("sqlite:///file:own.db?uri=true") == ["first"]
    assert {path.name for path in tmp_path.iterdir()} == {"own.db", "own.db-wal", "own.db-shm"}  # and none of the address's name
