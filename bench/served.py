"""The assistant's server in a process of its own, for benchmarks, and clients of it that cost little: one event loop, plain HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.clone import REPOSITORY
from rlhf import config, registry
from rlhf.data.sandbox import make_rows
from rlhf.models.policy import build_policy, load_policy
from rlhf.models.tokenizer import build_tokenizer, load_tokenizer

sys.path.insert(0, str(REPOSITORY))

from tests.registry.workspaces import train, workspace

SECONDS_TO_START = 120
LAST = b"0\r\n\r\n"  # of a reply in chunks
Json = dict[str, Any]


def model_of(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its tokenizer; without a folder, a random one of the sandbox's shape."""
    if folder:
        return load_policy(folder, "fp32"), load_tokenizer(folder)
    base: Any = config.load(REPOSITORY / "presets/sandbox.yaml").base
    texts = (row["text"] for row in make_rows("text", 2000, 1, 0.0))
    tokenizer = build_tokenizer(texts, base.vocab_size, base.context_tokens)
    return build_policy(base, tokenizer, 1), tokenizer


def workspace_of(root: Path, folder: Path | None, *changes: tuple[str, str]) -> Path:
    """A workspace whose champion is that model.

    Args:
        root: its path.
        folder: of the model.
        changes: of params.yaml, a text that stands there and what is to stand in its place.
    """
    workspace(root, *model_of(folder))
    params = root / "params.yaml"
    content = params.read_text(encoding="utf-8")
    for before, after in changes:
        assert before in content
        content = content.replace(before, after)
    params.write_text(content, encoding="utf-8")
    return root


def second_version(root: Path) -> int:
    """Register one that answers otherwise."""
    params = config.load(root / "params.yaml")
    model, _ = model_of(root / "models/ppo")
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    shutil.rmtree(root / "models/ppo/model.safetensors", ignore_errors=True)
    model.save_pretrained(root / "models/ppo")
    train(root, 2)
    return registry.register(root, params).number


def prompts(count: int) -> list[list[Json]]:
    """Dialogues to ask, the sandbox's own."""
    return [row["prompt"] for row in make_rows("prompts", count, 7, 0.0)]


class Server:
    """`rlhf serve --only assistant` of a workspace, ready to answer."""

    def __init__(self, root: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        environment.pop("MLFLOW_TRACKING_URI", None)  # MLflow has set it in this process
        self._log = (root / "server.log").open("w")
        command = [sys.executable, "-m", "rlhf.cli", "serve", "--only", "assistant", "--port", "0"]
        self.process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout
        said = self.process.stdout.readline()
        assert "http://" in said, (root / "server.log").read_text()
        self.port = int(said.partition("http://")[2].partition("/")[0].rpartition(":")[2])
        deadline = time.monotonic() + SECONDS_TO_START
        while not asyncio.run(self._is_well()):
            assert time.monotonic() < deadline, (root / "server.log").read_text()
            time.sleep(0.1)

    async def _is_well(self) -> bool:
        try:
            return (await self.get("/health"))[0] == 200
        except OSError:
            return False

    async def get(self, path: str) -> tuple[int, bytes]:
        async with Client(self.port) as client:
            return await client.exchange("GET", path, b"")

    @property
    def processor(self) -> float:
        """Seconds of processor time so far, of the server and of its engines' process."""
        own = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(SECONDS_TO_START)
        self._log.close()


@dataclass
class Heard:
    """What came back of one request."""

    status: int
    seconds: float
    first: float = 0.0  # seconds to the first text
    tokens: int = 0
    text: str = ""
    models: tuple[str, ...] = ()  # that the reply, or any chunk of it, names
    whole: bool = True


class Client:
    """One connection, kept for one request after the other."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    def _send(self, method: str, path: str, content: bytes) -> None:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)

    async def exchange(self, method: str, path: str, content: bytes) -> tuple[int, bytes]:
        """Status and body of a reply that comes as a whole."""
        self._send(method, path, content)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head.split(maxsplit=2)[1]), await self._reader.readexactly(length)

    async def ask(self, body: Json) -> Heard:
        """Ask for an answer, and hear all of it; what a stream brings is read once it is over."""
        began = time.perf_counter()
        if not body.get("stream"):
            status, content = await self.exchange("POST", "/v1/chat/completions", json.dumps(body).encode())
            return _heard(status, [json.loads(content)], time.perf_counter() - began)
        self._send("POST", "/v1/chat/completions", json.dumps(body | {"stream_options": {"include_usage": True}}).encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        parts, first, tail = [], 0.0, b""
        while not tail.endswith(LAST):
            part = await self._reader.read(1 << 16)
            if not part:
                break
            if not first and b'"content":' in part.replace(b'"content":""', b""):
                first = time.perf_counter() - began
            parts.append(part)
            tail = (tail + part)[-len(LAST) :]
        seconds = time.perf_counter() - began
        lines = [line[6:] for line in b"".join(parts).splitlines() if line.startswith(b"data: ")]
        found = _heard(int(head.split(maxsplit=2)[1]), [json.loads(line) for line in lines if line != b"[DONE]"], seconds)
        found.first, found.whole = first or seconds, bool(lines) and lines[-1] == b"[DONE]"
        return found


def _heard(status: int, told: Sequence[Json], seconds: float) -> Heard:
    found = Heard(status, seconds, seconds, models=tuple(sorted({part.get("model", "") for part in told})))
    for part in told:
        found.tokens += (part.get("usage") or {}).get("completion_tokens", 0)
        for choice in part.get("choices", ()):
            found.text += (choice.get("message") or choice.get("delta") or {}).get("content") or ""
            found.whole = found.whole and "error" not in part
    return found


async def ask_all(port: int, bodies: Sequence[Json], clients: int) -> list[Heard]:
    """Have so many clients at once ask all of it, each one request after the other; answers in the order of the requests."""
    waiting = iter(enumerate(bodies))
    found: dict[int, Heard] = {}

    async def client() -> None:
        async with Client(port) as own:
            for number, body in waiting:
                found[number] = await own.ask(body)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [found[number] for number in range(len(bodies))]


def bodies_of(dialogues: Sequence[list[Json]], limit: int, **more: Any) -> list[Json]:
    """A request for each dialogue, each with a seed of its own."""
    seeds = random.Random(1)
    return [
        {"model": "assistant", "messages": messages, "max_tokens": limit, "seed": seeds.randrange(2**31)} | more for messages in dialogues
    ]
