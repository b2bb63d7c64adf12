"""The server in a process of its own, asked by OpenAI's client and by clients that mean no good; versions that come and go meanwhile."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from openai import OpenAI
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import registry
from rlhf.errors import UserError
from rlhf.serving import exchange
from rlhf.serving.api import create
from rlhf.serving.exchange import Exchange
from rlhf.serving.service import Service
from rlhf.serving.versions import Versions
from tests.conftest import tiny_llama
from tests.registry.workspaces import load, train, workspace

PROJECT = Path(__file__).parents[2]
SECONDS = 120  # they only bound a failing test
ENDED = "rlhf_requests_total{"
ASKED: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is the capital of France?"}]


class Server:
    """`rlhf serve --only assistant` in a workspace."""

    def __init__(self, root: Path, key: str = "none", **variables: str) -> None:
        self.root = root
        environment = os.environ | {"PYTHONPATH": str(PROJECT)} | variables
        self.log = (root / "log").open("w")
        command = [sys.executable, "-m", "rlhf.cli", "serve", "--only", "assistant", "--port", "0"]
        self.process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.greeting)
        assert found, self.greeting + self.said()
        self.address = found[0]
        self.client = OpenAI(base_url=self.address, api_key=key, max_retries=0, timeout=SECONDS)
        headers = {"authorization": f"Bearer {key}"}
        self.raw = httpx.Client(base_url=self.address.removesuffix("/v1"), timeout=SECONDS, headers=headers)
        until(self._answers, "it does not answer")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.said()
        try:
            return self.raw.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def said(self) -> str:
        return (self.root / "log").read_text()

    def health(self) -> Any:
        return self.raw.get("/health").json()

    def ask(self, **more: Any) -> Any:
        asked: Any = {"model": "assistant", "messages": ASKED, "seed": 1, "max_tokens": 12} | more
        return self.client.chat.completions.create(**asked)

    def refused(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, str]:
        """Status and message of a request that must be refused."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = self.raw.post(path, content=content, headers={"content-type": "application/json"})
        error = found.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return found.status_code, error["message"]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(SECONDS)


def until(holds: Any, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def change(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))


def small(root: Path, *changes: tuple[str, str]) -> None:
    """Have a workspace serve a tiny model, with changes in params.yaml."""
    params = (root / "params.yaml").read_text()
    usual = (
        ("max_prompt_tokens: 192", "max_prompt_tokens: 96"),
        ("max_tokens: 64\n  max_body", "max_tokens: 32\n  max_body"),
        ("refresh_seconds: 2.0", "refresh_seconds: 0.2"),
    )
    for before, after in (*usual, *changes):
        assert before in params
        params = params.replace(before, after)
    (root / "params.yaml").write_text(params)


@pytest.fixture(scope="module")
def server(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow has set it to the workspace of another test
        root = workspace(tmp_path_factory.mktemp("api") / "work", tiny_llama(tokenizer), tokenizer)
        small(root)
        found = Server(root)
        yield found
        found.end()


def another_version(server: Server, llama: LlamaForCausalLM, number: int) -> int:
    """Register a version that answers otherwise, which no alias points at yet."""
    change(llama)
    llama.save_pretrained(server.root / "models/ppo")
    train(server.root, number)
    return registry.register(server.root, load(server.root)).number


def test_the_client_of_openai_asks_and_streams(server: Server) -> None:
    assert "Loading weights" not in server.said()
    whole = server.ask(n=2, temperature=0.9, top_p=0.95, user="me", logprobs=True, top_logprobs=2)
    assert "no key is asked for" in server.greeting
    assert (whole.model, whole.object) == ("assistant/1", "chat.completion")
    assert whole.system_fingerprint.startswith("assistant/1-")
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert {choice.finish_reason for choice in whole.choices} <= {"stop", "length"}
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    first = whole.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= token.top_logprobs[0].logprob + 1e-6 for token in first)
    options: Any = {"include_usage": True}
    chunks = list(server.ask(n=2, temperature=0.9, top_p=0.95, stream=True, stream_options=options))
    texts, ends = ["", ""], ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices, chunks[-1].usage) == ("assistant", [], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    assert (
        server.ask(model="assistant@champion").choices[0].message.content
        == server.ask(max_tokens=None, max_completion_tokens=12).choices[0].message.content
    )
    assert {model.id for model in server.client.models.list()} == {"assistant", "assistant@champion", "assistant/1"}
    text = server.ask().choices[0].message.content
    cut = server.ask(stop=text[5:8]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(text[5:8])], "stop")
    done = server.client.completions.create(model="assistant/1", prompt="The capital of", max_tokens=5, seed=3, logprobs=1)
    assert done.object == "text_completion"
    assert done.usage
    assert 1 <= done.usage.completion_tokens <= 5
    streamed = server.client.completions.create(model="assistant/1", prompt="The capital of", max_tokens=5, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == done.choices[0].text
    with server.raw.stream("POST", "/v1/chat/completions", json={"model": "assistant", "messages": ASKED, "stream": True}) as stream:
        assert stream.headers["x-model-version"] == "assistant/1"
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert list(stream.iter_lines())[-2:] == ["data: [DONE]", ""]
    said = server.raw.get("/metrics").text
    assert 'rlhf_requests_total{finish="stop",version="assistant/1"}' in said or 'finish="length",version="assistant/1"' in said


def test_what_is_not_honoured_or_wrong_is_refused_in_the_form_of_openai(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="these are: assistant, assistant@champion, assistant/1"):
        server.ask(model="gpt-5")
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        server.ask(frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match=r"response_format.type: Input should be 'text'"):
        server.ask(response_format={"type": "json_object"})
    good = {"model": "assistant", "messages": ASKED}
    for more, word in (
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"n": 1000}, "n: "),
        ({"max_tokens": 10**6}, "serving.max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"top_logprobs": 3}, "logprobs: true"),
        ({"stream_options": {}}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "user's"),
        ({"messages": [{"role": "assistant", "content": "x"}, *ASKED[1:]]}, "first one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "should be 'text'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "word " * 500}]}, "tokens"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 5000 + ASKED[1:]},
            "10001 tokens at least",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a character"),
        ({"\ud800": 1}, "unicode"),
        ({"model": "../../etc/passwd"}, "not served"),
        ({"model": "assistant/../1"}, "not served"),
        ({"model": None}, "model"),
    ):
        status, message = server.refused(good | more)
        assert status in (400, 404), (more, message)
        assert word in message
    assert server.refused(b"{")[0] == 400
    assert server.refused(b'{"model": "\xff\xfe"}')[0] == 400
    assert server.refused(b"[" * 100_000)[0] == 400
    assert server.refused(b" " * (10 << 20))[0] == 413
    for path in ("/v1/nothing", "/../etc/passwd", "/%2e%2e/etc/passwd", "/docs"):
        assert server.raw.get(path).status_code == 404
    assert server.raw.get("/v1/chat/completions").json()["error"]["type"] == "invalid_request_error"
    assert server.ask().choices  # it is well


def test_a_client_that_leaves_makes_room(server: Server) -> None:
    def over() -> float:
        """Answers that have ended."""
        return sum(float(line.rpartition(" ")[2]) for line in server.raw.get("/metrics").text.splitlines() if line.startswith(ENDED))

    for stream in (True, False):
        before, body = over(), {"model": "assistant", "messages": ASKED, "n": 16, "stream": stream}
        with socket.create_connection(("127.0.0.1", httpx.URL(server.address).port or 0)) as line:
            content = json.dumps(body).encode()
            lines = (
                "POST /v1/chat/completions HTTP/1.1",
                "host: localhost",
                "content-type: application/json",
                f"content-length: {len(content)}",
            )
            head = "".join(f"{one}\r\n" for one in (*lines, ""))
            line.sendall(head.encode() + content)
            time.sleep(0.05)
        until(lambda before=before: over() > before, "it has not begun")
    until(lambda: 'rlhf_writing{version="assistant/1"} 0.0' in server.raw.get("/metrics").text, "it writes for nobody")
    assert server.ask().choices


def test_a_promotion_under_load_fails_no_request_and_mixes_no_answer(server: Server, llama: LlamaForCausalLM) -> None:
    params = load(server.root)
    number = another_version(server, llama, 2)
    stopped = threading.Event()
    found: set[tuple[str, int, str]] = set()

    def client(number: int) -> None:
        while not stopped.is_set():
            for seed in range(number * 3, number * 3 + 3):
                reply = server.ask(seed=seed, temperature=1.0)
                found.add((reply.model, seed, reply.choices[0].message.content))

    with ThreadPoolExecutor() as clients:
        asking = [clients.submit(client, each) for each in range(4)]
        try:
            for wanted in (number, 1, number):
                seen = registry.aliases(server.root, params)["champion"]
                registry.promote(registry.find(server.root, params, wanted), seen, server.root, params, by="me", why="test")
                until(lambda wanted=wanted: server.health()["versions"]["champion"] == f"assistant/{wanted}", "it is not swapped in")
                time.sleep(0.5)
        finally:
            stopped.set()
        assert [one.result() for one in asking] == [None] * 4
    assert len(found) == len({(version, seed) for version, seed, _ in found})  # one text for a version and a seed
    assert len({text for version, seed, text in found if seed == 0}) == len({version for version, _, _ in found}) == 2


def test_a_damaged_version_is_not_served_and_the_old_one_stays(server: Server, llama: LlamaForCausalLM) -> None:
    params = load(server.root)
    before = server.health()["versions"]["champion"]
    version = registry.find(server.root, params, another_version(server, llama, 3))
    folder = registry.model_folder(version.uri, server.root, params)
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    MlflowClient().set_registered_model_alias("assistant", "champion", str(version.number))  # `rlhf promote` would have looked
    until(lambda: "champion" in server.health()["problems"], "nothing is said of it")
    assert "was changed after it was registered" in server.health()["problems"]["champion"]
    assert server.health()["versions"] == {"champion": before}
    assert server.ask().model == before
    assert "was changed" in server.said()


def test_a_version_that_cannot_be_opened_is_not_read_again_until_something_changes(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = workspace(tmp_path / "work", llama, tokenizer)
    small(root)
    params, read, look = load(root), list[str](), registry.model_folder

    def reading(uri: str, *more: Any) -> Path:
        read.append(uri)
        return look(uri, *more)

    monkeypatch.setattr(registry, "model_folder", reading)
    config = look("models:/assistant/1", root, params) / "config.json"
    config.chmod(0o644)
    whole = config.read_bytes()
    config.write_bytes(whole + b" ")
    versions = Versions(root, params)

    def refresh(count: int) -> int:
        before = len(read)
        for _ in range(count):
            versions.refresh()
        return len(read) - before

    assert refresh(3) == 1
    assert "was changed" in versions.problems["champion"]
    with pytest.raises(UserError, match="was changed"):
        versions.open("assistant/1")
    assert len(read) == 1
    config.write_bytes(whole + b"\n")
    assert refresh(2) == 1
    MlflowClient().set_registered_model_alias("assistant", "candidate", "1")
    assert refresh(2) == 1
    config.write_bytes(whole)
    assert refresh(2) == 1
    assert versions.problems == {}
    assert versions.by_alias["champion"].name == "assistant/1"
    versions.stop()


def test_who_leaves_is_missed_before_a_stream_begins_and_while_text_comes_without_a_pause(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(exchange, "SECONDS_BETWEEN_LOOKS", 0.1)
    root = workspace(tmp_path / "work", llama, tokenizer)
    small(root, ("slots: 64\n  queue", "slots: 1\n  queue"))
    service = Service(root, load(root))
    head = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    place = {"method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
    asgi = {"type": "http", "http_version": "1.1", "asgi": {"spec_version": "2.3"}, "scheme": "http", "client": None, "server": None}

    async def leave(app: Any, stream: bool) -> None:
        body = json.dumps({"model": "assistant", "prompt": ["The", "A"] * 4, "n": 16, "stream": stream}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send(_: Any) -> None:
            pass

        await app(asgi | place | {"headers": head, "state": {}}, receive, send)

    app = create(service)
    with TestClient(app, base_url="http://localhost") as client:
        until(lambda: client.get("/health").status_code == 200, "it is not ready")
        assert client.portal
        engine = service.versions.by_alias["champion"].engine
        for count, stream in enumerate((True, False), start=1):
            client.portal.call(leave, app, stream)
            until(lambda: engine.at_work == (0, 0), "it is written for nobody")
            metrics = client.get("/metrics").text
            assert f'finish="cancelled",version="assistant/1"}} {count}.0' in metrics
            assert "rlhf_refused_total{" not in metrics  # nobody was there to be told


def test_an_answer_that_takes_too_long_is_given_up_and_said_so(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = workspace(tmp_path / "work", llama, tokenizer)
    small(root, ("  seconds: 120.0", "  seconds: 1.0e-6"))
    with TestClient(create(Service(root, load(root))), base_url="http://localhost") as client:
        until(lambda: client.get("/health").status_code == 200, "it is not ready")
        for stream in (False, True):
            for _ in range(3):
                reply = client.post("/v1/chat/completions", json={"model": "assistant", "messages": ASKED, "stream": stream})
            gc.collect()
            assert not [held for held in gc.get_objects() if type(held) is Exchange]  # what was asked is not held on to
            told = [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if line.startswith(("data: {", "{"))][-1]
            assert (reply.status_code, told["error"]["code"]) == (200 if stream else 503, "timeout")
            assert "serving.seconds" in told["error"]["message"]
