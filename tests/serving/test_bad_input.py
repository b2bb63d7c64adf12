"""Clients that mean no good, or do not know better: each gets an error in OpenAI's form and learns nothing, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry, Counter
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from bench.faults.interface import words
from rlhf.serving import door
from rlhf.serving.bodies import Asked, ChatBody, CompletionBody
from rlhf.serving.replies import line as line_of
from tests.registry.workspaces import small, workspace
from tests.serving.test_api import ASKED, Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD: dict[str, Any] = {"model": "assistant", "messages": ASKED, "max_tokens": 3}
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow has set it to the workspace of another test
        root = workspace(tmp_path_factory.mktemp("bad") / "work", small(tokenizer), tokenizer)
        params = (root / "params.yaml").read_text()
        params = params.replace("max_prompt_tokens: 192", "max_prompt_tokens: 96")
        params = params.replace("slots: 64\n  queue: 256", "slots: 4\n  queue: 4")
        (root / "params.yaml").write_text(params)
        found = Server(root)
    yield found
    found.end()


def answer(server: Server, content: bytes, path: str = CHAT, kind: str = "application/json") -> httpx.Response:
    return server.raw.post(path, content=content, headers={"content-type": kind})


def error_of(server: Server, reply: httpx.Response) -> dict[str, Any]:
    """The error, which tells nothing of the server's inside."""
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-content-type-options"] == "nosniff"
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if reply.status_code < 500 else "server_error")
    assert len(error["message"]) <= 500
    for inside in (str(server.root), "Traceback", "site-packages", ".py"):
        assert inside not in reply.text
    return error


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_value"),
        (b"null", "invalid_value"),
        (b"[]", "invalid_value"),
        (b'"text"', "invalid_value"),
        (b"{", "invalid_json"),
        (b'{"model": "\xff\xfe"}', None),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None),
        (json.dumps(GOOD | {"temperature": float("nan")}).encode(), "invalid_value"),
        (json.dumps(GOOD | {"temperature": float("inf")}).encode(), "invalid_value"),
        (json.dumps(GOOD)[:-1].encode() + b', "top_p": 1e999}', "invalid_value"),
        (json.dumps(GOOD)[:-1].encode() + b', "seed": 1' + b"0" * 100 + b"}", "invalid_value"),
        (json.dumps(GOOD)[:-1].encode() + b', "seed": 1' + b"0" * 100_000 + b"}", None),
        (json.dumps(GOOD)[:-1].encode() + b', "max_tokens": 1e30}', "invalid_value"),
        (json.dumps(GOOD | {"max_tokens": True}).encode(), "invalid_value"),
        (json.dumps(GOOD | {"messages": {"role": "user"}}).encode(), "invalid_value"),
        (json.dumps(GOOD | {"messages": [{"role": SCRIPT, "content": SCRIPT}]}).encode(), "invalid_value"),
        (json.dumps(GOOD | {SCRIPT: SCRIPT}).encode(), "invalid_value"),
        (json.dumps(GOOD | {"x" * 100_000: 1}).encode(), "invalid_value"),
        (
            json.dumps(GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}).encode(),
            "invalid_value",
        ),
        (json.dumps(GOOD | {"messages": ASKED[1:] * 10_000}).encode(), "context_length_exceeded"),
        (json.dumps(GOOD | {"messages": [{"role": "user", "content": "a" * 900_000}]}).encode(), "context_length_exceeded"),
    ],
    ids=range(22),
)
def test_a_wrong_body_is_refused(server: Server, content: bytes, code: str | None) -> None:
    reply = answer(server, content)
    assert reply.status_code == 400
    assert error_of(server, reply)["code"] == code


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (ChatBody, {"messages": [1] * 100_000}),
        (ChatBody, {"messages": [{"role": "user", "content": [1] * 100_000}]}),
        (CompletionBody, {"prompt": [0.5] * 100_000}),
        (CompletionBody, {"prompt": [[0.5] * 100_000]}),
    ],
)
def test_many_wrong_elements_are_few_errors(kind: type[Asked], more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"model": "assistant"} | more)
    assert refused.value.error_count() < 5  # each holds what it is of: of a body of 1 MiB they took gigabytes, and seconds of all users


def test_an_error_names_the_field_as_the_client_does(server: Server) -> None:
    for more, param in (({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"), ({"stop": 5}, "stop")):
        reply = answer(server, json.dumps(GOOD | more).encode())
        assert (reply.status_code, error_of(server, reply)["param"]) == (400, param)


def test_names_are_no_paths(server: Server) -> None:
    models = ("", "../../etc/passwd", "assistant/../1", "assistant/01", "assistant/\u0661", "assistant@../champion", "models:/assistant")
    for name in (*models, "x" * 900_000):
        reply = answer(server, json.dumps(GOOD | {"model": name}).encode())
        assert (reply.status_code, error_of(server, reply)["code"]) in [(404, "model_not_found")], name
    paths = ("/..%2f..%2fetc%2fpasswd", "/v1/../../etc/passwd", "/v1/models/", "/v1/models/%00", "/docs")
    for path in paths:
        reply = server.raw.get(path)
        assert reply.status_code == 404
        error_of(server, reply)


def test_a_wrong_method_or_kind_of_content_is_refused(server: Server) -> None:
    reply = server.raw.get(CHAT)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    error_of(server, reply)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"):
        reply = answer(server, json.dumps(GOOD).encode(), kind=kind)
        assert (reply.status_code, error_of(server, reply)["code"]) == (400, "invalid_content_type")
    assert answer(server, json.dumps(GOOD).encode(), kind="application/json; charset=utf-8").status_code == 200


def test_a_body_that_is_too_large_is_refused_however_it_comes(server: Server) -> None:
    reply = answer(server, b" " * (10 << 20))
    assert (reply.status_code, error_of(server, reply)["code"]) == (413, "too_large")
    reply = server.raw.post(CHAT, content=(b" " * (1 << 16) for _ in range(160)), headers={"content-type": "application/json"})
    assert (reply.status_code, error_of(server, reply)["code"]) == (413, "too_large")


# in the place of keys and counts
NOTHING: Any = SimpleNamespace(refused=Counter("refused", "Of a test.", ["status"], registry=CollectorRegistry()))


def test_a_body_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "SECONDS_TO_SEND", 0.05)
    told: list[Any] = []
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        return next(parts, None) or await asyncio.Future()

    async def send(message: Any) -> None:
        told.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError

    place = door.Door(never, NOTHING, 1024, NOTHING)
    asyncio.run(place({"type": "http", "path": "/health", "headers": []}, receive, send))
    assert told[0]["status"] == 408
    assert "within" in json.loads(told[1]["body"])["error"]["message"]
    assert place.held == 0


def test_bodies_that_would_fill_the_memory_are_refused_while_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MOST_HELD", 1000)
    answered = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        size = len((await receive())["body"])
        await answered.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    place = door.Door(app, NOTHING, 600, NOTHING)

    async def ask(size: int) -> tuple[int, bytes]:
        parts = iter(
            [{"type": "http.request", "body": b"x" * part, "more_body": part != size // 2} for part in (size - size // 2, size // 2)]
        )
        told: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0)
            return next(parts)

        async def send(message: Any) -> None:
            told.append(message)

        await place({"type": "http", "path": "/health", "headers": []}, receive, send)
        return told[0]["status"], told[1]["body"]

    async def several() -> None:
        first = asyncio.create_task(ask(599))
        await asyncio.sleep(0.05)
        assert place.held == 599
        status, body = await ask(501)
        assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
        assert (await ask(701))[0] == 413
        assert place.held == 599
        answered.set()
        assert await ask(401) == (200, b"401")
        assert await first == (200, b"599")
        assert place.held == 0

    asyncio.run(several())


def test_a_stream_is_read_whole_however_its_lines_are_cut() -> None:
    said = "a\u2028b\u2029c\x85d\x0be"
    assert line_of({"a": said}).count("\n") == 2
    assert [json.loads(part.removeprefix("data: ")) for part in line_of({"a": said}).splitlines() if part] == [{"a": said}]


def test_more_prompts_than_may_ever_wait_are_refused(server: Server) -> None:
    status, message = server.refused({"model": "assistant", "prompt": ["The"] * 5}, COMPLETIONS)
    assert (status, "serving.queue is 4" in message) == (400, True)


def test_scripts_come_back_as_the_text_that_they_are(server: Server) -> None:
    reply = answer(server, json.dumps(GOOD | {"messages": [{"role": "user", "content": SCRIPT}], "model": SCRIPT}).encode())
    assert SCRIPT in error_of(server, reply)["message"]
    reply = answer(server, json.dumps(GOOD | {"messages": [{"role": "user", "content": SCRIPT}]}).encode())
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_who_breaks_off_leaves_nothing_behind(server: Server) -> None:
    port = httpx.URL(server.address).port or 0
    whole = json.dumps(GOOD | {"stream": True, "n": 16, "max_tokens": 60}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
        whole
    )
    for sent in (b"", b"POST /v1", head, head + whole[:20], b"\x16\x03\x01\x00\xff\x00", b"GET / HTTP/9.9\r\n\r\n", head + whole):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(sent)
            time.sleep(0.02)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as line:  # in the middle of a stream, with no goodbye
        line.sendall(head + whole)
        assert b"200 OK" in line.recv(4096)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    assert server.ask().choices
    deadline = time.monotonic() + 60
    while 'rlhf_writing{version="assistant/1"} 0.0' not in server.raw.get("/metrics").text:
        assert time.monotonic() < deadline, "it writes for nobody"
        time.sleep(0.05)


def test_who_comes_to_a_full_queue_is_told_to_come_again(server: Server) -> None:
    def ask(_: int) -> str | None:
        try:
            server.ask(n=8, max_tokens=20)
        except openai.RateLimitError as error:
            return error.code
        return None

    with ThreadPoolExecutor(16) as clients:
        codes = list(clients.map(ask, range(16)))
    assert {*codes} == {None, "queue_full"}
    assert codes.count(None) >= 4
    assert server.ask().choices


def test_what_docs_name_is_heeded(server: Server) -> None:
    def text(**more: Any) -> str:
        return str(server.ask(**more).choices[0].message.content)

    assert text(temperature=0.0) == text(temperature=0.0, seed=2)
    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert len({text(seed=seed, top_p=1e-6) for seed in range(4)}) == 1
    assert text(n=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[], user="me") == text()
    asks_nothing: dict[str, Any] = {"tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}}
    assert text(**asks_nothing, modalities=["text"]) == text()
    said, more = server.ask().choices[0].message, {"role": "user", "content": "And?"}
    assert text(messages=[*ASKED, said, more]) == text(messages=[*ASKED, said.model_dump() | {"annotations": []}, more])
    assert {server.client.models.retrieve(name).id for name in ("assistant", "assistant@champion", "assistant/1")} == {
        model.id for model in server.client.models.list()
    }
    parts = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": ASKED[1]["content"]}]}]
    assert text(messages=parts) == text()
    usual = server.ask(max_tokens=None, temperature=0.0).usage
    assert 0 < usual.completion_tokens <= 64  # serving.max_tokens
    told = list(server.ask(stream=True, logprobs=True, top_logprobs=1, temperature=0.0))
    tokens = [token for chunk in told for choice in chunk.choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in tokens] == [token.top_logprobs[0].token for token in tokens]
    assert len(tokens) == len(server.ask(logprobs=True, temperature=0.0).choices[0].logprobs.content)
    done = server.client.completions.create(model="assistant", prompt="The", max_tokens=4, n=2, seed=1, logprobs=2, stop=["\u0000"])
    assert [choice.index for choice in done.choices] == [0, 1]
    assert done.choices[0].logprobs
    assert all(len(top) == 2 for top in done.choices[0].logprobs.top_logprobs or [])
    asked: Any = {"model": "assistant", "prompt": "The", "max_tokens": 12, "seed": 1, "logprobs": 0, "stream": True}
    begins = [one.choices[0].logprobs for one in server.client.completions.create(**asked)]
    offsets = [start for one in begins if one for start in one.text_offset or []]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0 < offsets[-1]
    with pytest.raises(openai.NotFoundError) as missing:
        server.client.completions.create(model="assistant/7", prompt="a")
    assert missing.value.code == "model_not_found"


def test_schemathesis_finds_nothing(server: Server, tmp_path: Path) -> None:
    command = words(server.address.removesuffix("/v1"), 10, 1)
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout
    assert server.ask().choices
    assert "Traceback" not in server.said()
