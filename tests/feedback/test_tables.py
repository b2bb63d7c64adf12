"""The record's tables: what they keep, refuse and let go, with others at it, and after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from rlhf import config
from rlhf.errors import UserError
from rlhf.feedback import database
from rlhf.feedback.database import Database
from rlhf.feedback.tables import LAYOUT, Answer, Layout, Opinion, Pair, Rating

PROJECT = Path(__file__).parents[2]


def answer(reply: str = "chatcmpl-1", **more: Any) -> Answer:
    given: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Wer?"}],
        "text": "Ich. 🧪",
        "asked": "assistant",
        "version": "assistant/1",
        "digest": "0" * 64,
        "sampling": {"temperature": 1.0},
        "seed": 2**63 - 1,
        "finish": "stop",
        "prompt_tokens": 3,
        "answer_tokens": 2,
        "seconds": 0.1,
    }
    return Answer(reply=reply, choice=0, **given | more)


def pair(name: str, **more: Any) -> Pair:
    texts = {"first_text": "x", "first_version": "assistant/1", "second_text": "y", "second_version": "assistant/2"}
    return Pair(name=name, source="shadow", prompt=[{"role": "user", "content": "Wer?"}], **texts | more)


def rating(token: str, number: int, **more: Any) -> Rating:
    return Rating(**{"token": token, "pair_id": number, "rater": "me", "swapped": False, "choice": "a"} | more)


def refuses(record: Database, *rows: Any) -> None:
    with pytest.raises(IntegrityError), record.writing() as session:
        session.add_all(rows)


def test_what_is_kept_comes_back(record: Database, tmp_path: Path) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).astimezone()
    with record.writing() as session:
        session.add(answer(at=at, text="a\0b\ud800"))
    with record.reading() as session:
        (found,) = session.scalars(select(Answer))
        assert (found.at, found.seed, found.text) == (at, 2**63 - 1, "a\ufffdb?")
        assert found.messages == [{"role": "user", "content": "Wer?"}]
        assert found.prompt is None
    assert (tmp_path / "feedback").stat().st_mode & 0o777 == 0o700
    assert record.engine.connect().exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    assert record.engine.connect().exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_nothing_is_there_twice_and_no_choice_is_unknown(record: Database) -> None:
    with record.writing() as session:
        session.add_all([answer(), pair("one")])
    refuses(record, answer())
    refuses(record, pair("one"))
    refuses(record, pair("two", gold="a"))
    with record.writing() as session:
        session.add(rating("t1", 1))
    refuses(record, rating("t1", 1, rater="you"))
    refuses(record, rating("t2", 1))
    refuses(record, rating("t3", 1, rater="you", choice="c"))
    refuses(record, rating("t3", 2, rater="you"))  # no such pair
    refuses(record, Opinion(token="o", answer_id=1, thumb=2))
    with record.writing() as session:
        session.get_one(Rating, 1).revoked = datetime.now(UTC)
    with record.writing() as session:
        session.add(rating("t2", 1, choice="tie"))
    with record.reading() as session:
        assert [found.choice for found in session.get_one(Pair, 1).ratings] == ["a", "tie"]


def test_a_verdict_is_of_the_answers_however_they_were_shown() -> None:
    given = [("a", False), ("a", True), ("b", False), ("b", True), ("tie", True), ("both-bad", False), ("skip", True)]
    found = [rating("t", 1, choice=choice, swapped=swapped).verdict for choice, swapped in given]
    assert found == ["first", "second", "second", "first", "tie", "both-bad", "skip"]


def test_what_hangs_on_an_answer_goes_with_it(record: Database) -> None:
    with record.writing() as session:
        session.add_all([answer(user="u"), answer("chatcmpl-2")])
        session.flush()
        session.add_all([pair("one", first_answer=1), pair("two", first_answer=2), Opinion(token="o", answer_id=1, thumb=1)])
        session.flush()
        session.add_all([rating("t1", 1), rating("t2", 2), pair("again", repeat_of=1)])
    with record.writing() as session:
        session.execute(delete(Answer).where(Answer.user == "u"))
    with record.reading() as session:
        counts = [session.scalar(select(func.count()).select_from(table)) for table in (Answer, Pair, Rating, Opinion)]
        assert counts == [1, 1, 1, 0]


def _writes(place: str, number: int) -> None:
    found = Database(place)
    for each in range(20):
        with found.writing() as session:
            known = session.scalar(select(func.count()).select_from(Answer))  # it reads first, and then writes
            session.add(answer(f"{number}-{each}", prompt_tokens=known))


def test_several_that_begin_and_write_at_once_fail_nothing(tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path / 'feedback.db'}"
    processes = [multiprocessing.get_context("spawn").Process(target=_writes, args=(place, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    with Database(place).reading() as session:
        assert sorted(session.scalars(select(Answer.prompt_tokens))) == list(range(80))


def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path / 'feedback.db'}"
    Database(place).close()
    writes = f"""
from rlhf.feedback.database import Database
from tests.feedback.test_tables import answer
found = Database({place!r})
for number in range(10**6):
    with found.writing() as session:
        session.add(answer(str(number)))
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", writes], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    said = len(lines) + len(process.stdout.readlines())
    process.wait()
    with Database(place).reading() as session:
        assert session.scalar(select(func.count()).select_from(Answer)) in (said, said + 1)


def test_an_address_that_is_none_or_holds_a_password_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = config.load(PROJECT / "params.yaml")
    for given, word in (("here", "no address"), ("nonsense://x/y", "no address"), ("postgresql://me@127.0.0.1:1/x", "cannot be opened")):
        monkeypatch.setenv("RLHF_DATABASE_URL", given)
        with pytest.raises(UserError, match=word):
            database.connect(tmp_path, params)
    text = (PROJECT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("  database:\n", "  database: postgresql://me:secret@host/x\n"))
    with pytest.raises(UserError, match="holds a password") as refused:
        config.load(tmp_path / "params.yaml")
    assert "secret" not in str(refused.value)


def test_the_record_is_no_file_of_git_or_dvc() -> None:
    for name in (".gitignore", ".dvcignore"):
        assert "/feedback/" in (PROJECT / name).read_text().splitlines()


def test_times_are_of_utc(record: Database) -> None:
    with record.writing() as session:
        session.add(answer())
    with record.reading() as session:
        (at,) = session.scalars(select(Answer.at))
        assert at.tzinfo == UTC
        assert abs(at - datetime.now(UTC)) < timedelta(minutes=1)


def test_tables_of_another_layout_are_left_alone(tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path / 'feedback.db'}"
    first = Database(place)
    with first.writing() as session:
        session.execute(update(Layout).values(number=LAYOUT + 1))
    first.close()
    with pytest.raises(UserError, match=f"tables in layout {LAYOUT + 1}, and this code knows layout {LAYOUT}"):
        Database(place)


def test_what_is_written_to_a_file_that_is_gone_is_not_acknowledged(record: Database, tmp_path: Path) -> None:
    with record.writing() as session:
        session.add(answer("before"))
    for file in (tmp_path / "feedback").glob("feedback.db*"):
        file.unlink()
    with pytest.raises(UserError, match="deleted or replaced"), record.writing() as session:
        session.add(answer("after"))
    assert not record.is_there
