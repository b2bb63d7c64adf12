"""The writer of answers: nobody waits for it, whatever the database does, and what it cannot keep is counted."""

from __future__ import annotations

import gc
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from rlhf import config
from rlhf.errors import UserError
from rlhf.feedback import database, recorder
from rlhf.feedback.database import Database, Kept
from rlhf.feedback.hashes import Hashes
from rlhf.feedback.recorder import Recorder
from rlhf.feedback.tables import Answer, Opinion
from rlhf.serving.record import Record
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


@pytest.fixture
def place(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'feedback.db'}"


def replies(place: str) -> list[str]:
    with Database(place).reading() as session:
        return sorted(session.scalars(select(Answer.reply)))


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def made(place: str, *names: str) -> None:
    record = Database(place)
    with record.writing() as session:
        session.add_all([Answer(**row(name)) for name in names])
    record.close()


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


def test_hashes_are_keyed_and_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_HASH_KEY", raising=False)
    for name in "abc":
        (tmp_path / name).mkdir()
    first, again = Hashes(tmp_path / "a"), Hashes(tmp_path / "a")
    other = Hashes(tmp_path / "b")
    assert first.of("user", "ü") == again.of("user", "ü")
    assert len({first.of("user", "ü"), first.of("conversation", "ü"), other.of("user", "ü")}) == 3
    shares = [first.share("user", str(number)) for number in range(4000)]
    assert abs(sum(share < 0.25 for share in shares) / 4000 - 0.25) < 0.03
    assert all(0 <= share < 1 for share in shares)
    assert [path.name for path in (tmp_path / "a/feedback").iterdir()] == ["key"]
    before, key = first.of("user", "ü"), tmp_path / "a/feedback/key"
    key.unlink()
    key.parent.rmdir()
    first.keep()  # what a server hashed with it is found later, too
    assert Hashes(tmp_path / "a", new=False).of("user", "ü") == first.of("user", "ü") == before
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="is missing"):
        Hashes(tmp_path / "c", new=False)
    key.write_text("restored")
    first.keep()
    assert first.of("user", "ü") == Hashes(tmp_path / "a").of("user", "ü") != before
    key.chmod(0o644)
    with pytest.raises(UserError, match="others may read"):
        Hashes(tmp_path / "a")
    monkeypatch.setenv("RLHF_HASH_KEY", "of the team")
    assert Hashes(tmp_path / "a").of("user", "ü") == Hashes(tmp_path / "c").of("user", "ü")
    assert not list((tmp_path / "c").iterdir())


def test_a_key_that_was_made_anew_is_told_of_where_users_were_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params, key = config.load(REPOSITORY / "params.yaml"), tmp_path / "feedback/key"

    def told(name: str) -> bool:
        caplog.clear()
        record = Record(tmp_path, params)
        with record.kept.get().writing() as session:
            session.add(Answer(**row(name, user=record.hashes.of("user", name))))
        record.recorder.stop()
        return "finds nobody who asked before" in caplog.text

    assert not told("anna")
    assert not told("bert")
    key.unlink()
    assert told("carl")


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
