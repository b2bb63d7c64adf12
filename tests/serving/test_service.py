"""One server with all that a team has: keys, a record, a candidate that answers a share of the conversations, and shadows."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest
from sqlalchemy import func, select
from transformers import PreTrainedTokenizerFast

from bench.faults.answers import Told, asking, kill, texts
from rlhf import config, registry, tracking
from rlhf.feedback import database
from rlhf.feedback.database import Database
from rlhf.feedback.hashes import Hashes
from rlhf.feedback.tables import Answer
from tests.conftest import tiny_llama
from tests.registry.workspaces import load, train, workspace
from tests.serving.test_api import ASKED, SECONDS, Server, change, small, until

KEYS = {name: f"{name}-0123456789abcdef" for name in ("team", "app", "limited")}
ASKS = """  keys:
    - {name: team, roles: [ask, rate, administer], variable: TEAM, file: null, requests_per_minute: null, max_body_kib: null}
    - {name: app, roles: [ask], variable: null, file: app.key, requests_per_minute: null, max_body_kib: 1}
    - {name: limited, roles: [ask], variable: LIMITED, file: null, requests_per_minute: 2, max_body_kib: null}
"""


@pytest.fixture(scope="module")
def server(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow has set it to the workspace of another test
        root = workspace(tmp_path_factory.mktemp("service") / "work", tiny_llama(tokenizer), tokenizer)
        (root / "app.key").write_text(KEYS["app"] + "\n")
        (root / "app.key").chmod(0o600)
        small(root, ("  keys: []\n", ASKS), ("{candidate: 0.0, shadow: 0.0}", "{candidate: 0.5, shadow: 1.0}"))
        model = tiny_llama(tokenizer)
        for number in (2, 3, 4):
            change(model)
            model.save_pretrained(root / "models/ppo")
            train(root, number)
            assert registry.register(root, load(root)).number == number
        tracking.client(root, load(root)).set_registered_model_alias("assistant", "candidate", "2")
        found = Server(root, KEYS["team"], TEAM=KEYS["team"], LIMITED=KEYS["limited"])
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
    known: dict[str, Any] = {"model": "assistant@champion", "user": "anna", "metadata": {"conversation": "4711"}}
    unkept = server.ask(**known)
    kept = server.ask(**known, store=True, n=2, temperature=0.8, top_p=0.9, stop=["##"])
    first, second = answers(record, kept.id, 2)
    assert [first.text, second.text] == [choice.message.content for choice in kept.choices]
    assert [first.finish, second.finish] == [choice.finish_reason for choice in kept.choices]
    assert (first.seed, second.seed, first.version, first.asked, first.consented) == (1, 2, "assistant/1", "assistant@champion", True)
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
    assert time.monotonic() - began < 20  # as long as one that waited for it would take at least
    other.rollback()
    for reply in asked:
        answers(record, reply, 1)


def test_an_application_may_speak_of_an_answer_at_once(server: Server, record: Database) -> None:
    said = {"id": server.ask(store=True).id, "thumb": "up"}
    assert server.raw.post("/v1/feedback", json=said).status_code == 200
    other = sqlite3.connect(server.root / "feedback/feedback.db")
    other.execute("BEGIN IMMEDIATE")
    found = server.raw.post("/v1/feedback", json=said | {"id": server.ask(store=True).id})
    other.rollback()
    assert (found.status_code, found.json()["error"]["code"]) == (503, "record_away")


def test_a_user_is_forgotten_at_a_word(server: Server, record: Database) -> None:
    answers(record, server.ask(user="otto", store=True).id, 1)
    command = [sys.executable, "-m", "rlhf.cli", "feedback", "forget", "otto"]
    # one, or two with a shadow that was written beside it
    for said in ("deleted: [12] answers", "nothing that this user asked"):
        done = subprocess.run(command, cwd=server.root, capture_output=True, text=True, check=True)
        assert re.search(said, done.stdout)
    with record.reading() as session:
        assert session.scalar(select(func.count()).where(Answer.user == Hashes(server.root).of("user", "otto"))) == 0


def test_a_key_is_needed_and_is_for_what_its_roles_say(server: Server, record: Database) -> None:
    assert "a key is asked for: team, app, limited" in server.greeting
    assert not any(key in server.greeting + server.said() for key in KEYS.values())
    place = server.address.removesuffix("/v1")
    with pytest.raises(openai.AuthenticationError, match="not known") as refused:
        server.client.with_options(api_key="wrong").models.list()
    assert refused.value.body == {
        "message": "this key is not known here",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    bare = httpx.post(f"{place}/v1/chat/completions", content=b"{")
    assert (bare.status_code, bare.headers["www-authenticate"]) == (401, "Bearer")
    assert httpx.post(f"{place}/v1/chat/completions", content=b" " * (3 << 20)).status_code == 401
    assert httpx.get(f"{place}/nothing").status_code == 401
    assert httpx.get(f"{place}/metrics").status_code == 401
    assert httpx.get(f"{place}/health").json() == {"status": "ok"}
    app = server.client.with_options(api_key=KEYS["app"])
    asked: dict[str, Any] = {"model": "assistant", "messages": ASKED, "max_tokens": 2}
    (kept,) = answers(record, app.chat.completions.create(**asked, store=True).id, 1)
    assert kept.key == "app"
    with pytest.raises(openai.APIStatusError, match="larger than 1024 bytes") as large:
        app.chat.completions.create(**asked, user="u" * 2000)
    assert large.value.status_code == 413
    denied = httpx.get(f"{place}/metrics", headers={"authorization": f"Bearer {KEYS['app']}"})
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "permission_denied")
    assert 'rlhf_refused_total{status="401"}' in server.raw.get("/metrics").text
    limited = server.client.with_options(api_key=KEYS["limited"])
    with pytest.raises(openai.RateLimitError, match="more than 2 requests a minute with key limited") as many:
        _ = [limited.chat.completions.create(**asked) for _ in range(3)]
    assert 1 <= int(many.value.response.headers["retry-after"]) <= 30


def test_a_conversation_stays_with_the_arm_that_it_was_drawn_for(server: Server, record: Database) -> None:
    def arm(*before: dict[str, str], **more: Any) -> str:
        return str(server.ask(messages=[*before, *ASKED[1:]], max_tokens=1, **more).model)

    by_name = {name: arm(metadata={"conversation": name}) for name in map(str, range(12))}
    assert set(by_name.values()) == {"assistant/1", "assistant/2"}
    turns = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."})
    assert {name: arm(*turns, metadata={"conversation": name}, user="x") for name in by_name} == by_name
    assert len({arm(*turns, user="anna") for _ in range(3)} | {arm(user="anna")}) == 1
    first = {"role": "user", "content": "Hello"}
    assert len({arm(first), arm(first, turns[1]), arm(first, turns[1], *turns)}) == 1
    for alias, number in (("champion", 1), ("candidate", 2)):
        assert {arm(model=f"assistant@{alias}", user=str(user)) for user in range(4)} == {f"assistant/{number}"}
        assert {arm(extra_headers={"x-arm": alias}, user=str(user)) for user in range(4)} == {f"assistant/{number}"}
    kept = server.ask(extra_headers={"x-arm": "candidate"}, store=True)
    assert answers(record, kept.id, 1)[0].arm == "candidate"
    with pytest.raises(openai.PermissionDeniedError, match="role administer"):
        server.client.with_options(api_key=KEYS["app"]).chat.completions.create(
            model="assistant", messages=ASKED, extra_headers={"x-arm": "candidate"}
        )
    for model, wanted in (("assistant", "nonsense"), ("assistant/1", "candidate")):
        with pytest.raises(openai.APIStatusError, match="x-arm"):
            server.ask(model=model, extra_headers={"x-arm": wanted})
    said = server.raw.get("/metrics").text
    assert all(f'rlhf_arm_requests_total{{arm="{alias}"}}' in said for alias in ("champion", "candidate"))


def test_a_shadow_is_written_beside_what_is_recorded_of_the_champion(server: Server, record: Database) -> None:
    champion: dict[str, Any] = {"model": "assistant@champion", "store": True, "user": "eve", "temperature": 1.0, "seed": 5}
    kept, streamed = server.ask(**champion), list(server.ask(**champion, stream=True))
    server.ask(**champion | {"model": "assistant@candidate"})
    for reply in (kept.id, streamed[0].id):
        (own,) = answers(record, reply, 1)
        assert own.correlation == reply

        def shadows(reply: str = reply) -> list[Answer]:
            with record.reading() as session:
                return list(session.scalars(select(Answer).where(Answer.correlation == reply, Answer.shadow)))

        until(lambda look=shadows: look(), "no shadow is written")
        (shadow,) = shadows()
        assert (shadow.version, shadow.arm, shadow.seed, shadow.messages) == ("assistant/2", "candidate", 5, ASKED)
        assert (shadow.user, shadow.sampling, shadow.consented) == (own.user, own.sampling, True)
        assert shadow.text == server.ask(model="assistant/2", temperature=1.0, seed=5).choices[0].message.content
    assert server.health()["warnings"] == {}
    assert re.search(r'rlhf_shadows_total\{outcome="written"\} [1-9]', server.raw.get("/metrics").text)
    # what is not recorded gets none, and where that is all there is, it is to be seen
    for _ in range(6):
        server.ask(model="assistant@champion", max_tokens=1)
    assert "no shadow was written beside the last answers" in server.health()["warnings"]["shadow"]


def test_a_version_is_served_by_its_number_and_few_are_held_ready(server: Server) -> None:
    said: dict[int, Any] = {}
    for number in (3, 4, 3):
        reply = server.ask(model=f"assistant/{number}")
        assert reply.model == f"assistant/{number}"
        assert said.setdefault(number, reply.choices[0].message.content) == reply.choices[0].message.content
        listed = {model.id for model in server.client.models.list()}
        assert listed == {"assistant", "assistant@champion", "assistant@candidate", "assistant/1", "assistant/2", f"assistant/{number}"}
    with pytest.raises(openai.NotFoundError, match="is not served"):
        server.ask(model="assistant/99")
    damaged = registry.model_folder(registry.find(server.root, load(server.root), 4).uri, server.root, load(server.root)) / "config.json"
    damaged.chmod(0o644)
    damaged.write_text(damaged.read_text() + " ")
    with pytest.raises(openai.APIStatusError, match="the server's log says why") as refused:
        server.ask(model="assistant/4")
    assert refused.value.status_code == 503
    assert "was changed after it was registered" in server.said()
    assert server.ask(model="assistant/3").model == "assistant/3"


def test_several_prompts_are_completed_in_one_request(server: Server, record: Database, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["The capital of", "Once upon"]
    asked: dict[str, Any] = {"model": "assistant/1", "max_tokens": 4, "seed": 3, "temperature": 1.0}
    create = server.client.completions.create
    alone = [create(prompt=prompt, n=2, **asked) for prompt in prompts]
    texts = [choice.text for reply in alone for choice in reply.choices]
    numbers = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    for given in (prompts, numbers):
        together = create(prompt=given, n=2, extra_body={"store": True}, **asked)
        assert [choice.text for choice in together.choices] == texts
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        assert together.usage.total_tokens == sum(reply.usage.total_tokens for reply in alone)
        kept = answers(record, together.id, 4)
        assert [answer.text for answer in kept] == texts
        assert [(answer.prompt, answer.seed) for answer in kept] == [(prompt, seed) for prompt in prompts for seed in (3, 4)]
    assert [choice.text for choice in create(prompt=numbers[0], n=2, **asked).choices] == texts[:2]
    streamed = ["", ""]
    for chunk in create(prompt=prompts, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts[::2]
    bad: tuple[Any, ...] = ([], [[]], [""], ["a", 1], [10**9], [-1], [True], ["a"] * 65)
    for wrong in bad:
        status, message = server.refused({"model": "assistant/1", "prompt": wrong}, "/v1/completions")
        assert (status, message.startswith("prompt")) == (400, True)


def counted(server: Server) -> list[str]:
    """Texts that began, and swaps."""
    return re.findall(r"^rlhf_(?:first_text_seconds_count|swaps) .*", server.raw.get("/metrics").text, re.MULTILINE)


def test_engines_that_die_are_there_again_and_answer_the_same(server: Server) -> None:
    before, numbers = server.ask(model="assistant@champion").choices[0].message.content, counted(server)
    (engines,) = (child for child in psutil.Process(server.process.pid).children() if "rlhf.serving.core" in child.cmdline())
    engines.suspend()
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(server.ask)
        until(lambda: re.search(r'rlhf_writing\{version="assistant/[12]"\} [1-9]', server.raw.get("/metrics").text), "nobody is answered")
        engines.kill()
        with pytest.raises(openai.InternalServerError) as failed:
            asked.result(SECONDS)
    assert failed.value.body["code"] == "engine_error"  # type: ignore[index]
    assert counted(server) == numbers  # it had no text
    with pytest.raises(openai.InternalServerError, match="try again"):
        server.ask()
    assert server.raw.get("/health").status_code == 503
    until(lambda: server.raw.get("/health").status_code == 200, "they do not come back")
    assert counted(server) == numbers  # no alias means another version
    assert server.ask(model="assistant@champion").choices[0].message.content == before
    assert server.health()["problems"] == {}
    assert "ended by itself (-9)" in server.said()


def test_a_kill_loses_no_answer_that_is_recorded_and_doubles_none(server: Server, record: Database) -> None:
    told = Told()
    with asking(server.address, 4, told, authorization=f"Bearer {KEYS['team']}"):
        until(lambda: len(texts(record).keys() & told.replies.keys()) > 4, "nothing is recorded")
        assert kill(record, server.process, told, 5) == []
    again = Server(server.root, KEYS["team"], TEAM=KEYS["team"], LIMITED=KEYS["limited"])
    answers(record, again.ask(store=True).id, 1)
    again.end()
