"""One server with all that a team has: a record."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from sqlalchemy import func, select
from transformers import PreTrainedTokenizerFast

from rlhf import config
from rlhf.feedback import database
from rlhf.feedback.database import Database
from rlhf.feedback.hashes import Hashes
from rlhf.feedback.tables import Answer
from tests.conftest import tiny_llama
from tests.registry.workspaces import workspace
from tests.serving.test_api import ASKED, Server, small, until


@pytest.fixture(scope="module")
def server(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow has set it to the workspace of another test
        root = workspace(tmp_path_factory.mktemp("service") / "work", tiny_llama(tokenizer), tokenizer)
        small(root)
        found = Server(root)
        yield found
        found.end()


@pytest.fixture
def record(server: Server) -> Iterator[Database]:
    found = database.connect(server.root, config.load(server.root / "params.yaml"))
    yield found
    found.close()


def answers(record: Database, reply: str, count: int) -> list[Answer]:
    """What is recorded of a reply, once it is."""

    def found() -> list[Answer]:
        with record.reading() as session:
            return list(session.scalars(select(Answer).where(Answer.reply == reply).order_by(Answer.choice)))

    until(lambda: len(found()) == count, "it is not recorded")
    return found()


def test_what_the_request_consents_to_is_recorded(server: Server, record: Database) -> None:
    known: dict[str, Any] = {"user": "anna", "metadata": {"conversation": "4711"}}
    unkept = server.ask(**known)
    kept = server.ask(**known, store=True, n=2, temperature=0.8, top_p=0.9, stop=["##"])
    first, second = answers(record, kept.id, 2)
    assert [first.text, second.text] == [choice.message.content for choice in kept.choices]
    assert [first.finish, second.finish] == [choice.finish_reason for choice in kept.choices]
    assert (first.seed, second.seed, first.version, first.asked, first.consented) == (1, 2, "assistant/1", "assistant", True)
    assert first.sampling == {"temperature": 0.8, "top_p": 0.9, "max_tokens": 12, "stop": ["##"]}
    assert (first.messages, first.prompt_tokens) == (ASKED, kept.usage.prompt_tokens)
    assert first.answer_tokens + second.answer_tokens == kept.usage.completion_tokens
    assert (first.user, first.conversation) == (
        Hashes(server.root).of("user", "anna"),
        Hashes(server.root).of("conversation", "4711"),
    )
    assert len(first.digest) == 64
    streamed = list(server.ask(stream=True, store=True))
    (whole,) = answers(record, streamed[0].id, 1)
    assert whole.text == "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    completed = server.client.completions.create(model="assistant/1", prompt="The", max_tokens=3, extra_body={"store": True})
    (own,) = answers(record, completed.id, 1)
    assert (own.prompt, own.messages, own.text) == ("The", None, completed.choices[0].text)
    with record.reading() as session:
        assert session.scalar(select(func.count()).where(Answer.reply == unkept.id)) == 0
    with pytest.raises(openai.BadRequestError, match=r"metadata.other: this field is not known"):
        server.ask(metadata={"other": "x"})
    assert "rlhf_unrecorded_total 0.0" in server.raw.get("/metrics").text


def test_a_record_that_is_locked_fails_no_answer(server: Server, record: Database) -> None:
    other = sqlite3.connect(server.root / "feedback/feedback.db")
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    asked = [server.ask(store=True).id for _ in range(3)]
    assert time.monotonic() - began < 10
    other.rollback()
    for reply in asked:
        answers(record, reply, 1)


def test_a_user_is_forgotten_at_a_word(server: Server, record: Database) -> None:
    answers(record, server.ask(user="otto", store=True).id, 1)
    command = [sys.executable, "-m", "rlhf.cli", "feedback", "forget", "otto"]
    for said in ("deleted: 1 answers", "nothing that this user asked"):
        done = subprocess.run(command, cwd=server.root, capture_output=True, text=True, check=True)
        assert said in done.stdout
    with record.reading() as session:
        assert session.scalar(select(func.count()).where(Answer.user == Hashes(server.root).of("user", "otto"))) == 0
