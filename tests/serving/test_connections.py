"""Connections of clients that say nothing, half of something, or take nothing: none of them is kept, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import subprocess
import sys
import threading
import time
from asyncio import selector_events
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from rlhf.serving import connections, descriptors
from rlhf.serving.server import listen

PROJECT = Path(__file__).parents[2]
MOST = 6
HEAD = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it got, or, on /much, with more than waits anywhere."""
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000 if scope["path"] == "/much" else 0):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": body + message.get("body", b"")})


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[uvicorn.Server, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "SECONDS_TO_ASK", 0.4)
        patch.setattr(connections, "SECONDS_TO_TAKE", 0.4)
        patch.setattr(connections, "SECONDS_TO_LEAVE", 0.2)
        listener = listen("127.0.0.1", 0, asks=False)
        options = uvicorn.Config(
            app, http=connections.protocol(MOST), ws="none", lifespan="off", log_level="critical", timeout_keep_alive=60
        )
        found = uvicorn.Server(options)
        thread = threading.Thread(target=found.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: found.started)
        yield found, listener.getsockname()[1]
        found.should_exit = True
        thread.join()


@pytest.fixture
def line(server: tuple[uvicorn.Server, int]) -> Iterator[Callable[..., socket.socket]]:
    opened: list[socket.socket] = []

    def connect(said: bytes = b"") -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", server[1]), timeout=60))
        opened[-1].sendall(said)
        return opened[-1]

    yield connect
    for each in opened:
        each.close()
    until(lambda: not server[0].server_state.connections)


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def trickle(line: socket.socket) -> None:
    for _ in range(100):
        line.sendall(b"P")
        time.sleep(0.05)


def everything(line: socket.socket) -> bytes:
    parts = []
    while part := line.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat", HEAD[:-2]])
def test_who_never_asks_is_let_go_and_told(line: Callable[..., socket.socket], said: bytes) -> None:
    reply = everything(line(said))
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_a_head_that_trickles_in_is_not_waited_for_either_nor_one_after_an_answer(line: Callable[..., socket.socket]) -> None:
    for before in (b"", HEAD + b"well"):
        slow = line(before)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            trickle(slow)


def test_who_is_answered_may_take_time(line: Callable[..., socket.socket]) -> None:
    slow = line(HEAD)
    time.sleep(0.6)  # the body is the door's to wait for
    slow.sendall(b"well")
    assert b"200 OK" in slow.recv(65536)


def test_who_takes_nothing_is_let_go(line: Callable[..., socket.socket], server: tuple[uvicorn.Server, int]) -> None:
    line(b"GET /much HTTP/1.1\r\nhost: localhost\r\n\r\n")
    until(lambda: server[0].server_state.tasks)
    until(lambda: not server[0].server_state.tasks)


def test_what_is_written_at_a_time_is_sent_together(line: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    transport: Any = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]  # asyncio's own, one call of the system each
    sent, write = list[bytes](), transport.write

    def counted(self: Any, data: bytes) -> None:
        sent.append(data)
        write(self, data)

    monkeypatch.setattr(transport, "write", counted)
    asking = line(HEAD + b"well")
    assert asking.recv(65536).endswith(b"4\r\nwell\r\n0\r\n\r\n")
    assert len(sent) == 1  # head, body and end


def test_beyond_the_bound_who_waits_longest_without_a_request_goes(
    line: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SECONDS_TO_ASK", 60.0)  # not for waiting too long
    first, *_ = [line(b"POST") for _ in range(MOST)]
    address = f"http://127.0.0.1:{first.getpeername()[1]}"
    assert httpx.post(address, content=b"well").content == b"well"
    assert first.recv(1) == b""
    busy = [line(HEAD) for _ in range(MOST)]  # whose bodies are waited for
    found = httpx.post(address, content=b"well")
    assert (found.status_code, found.json()["error"]["code"]) == (503, "busy")
    for each in busy:
        each.sendall(b"well")
        assert b"200 OK" in each.recv(65536)
    assert httpx.post(address, content=b"well").content == b"well"


def test_what_is_no_request_is_refused_in_the_form_of_openai(line: Callable[..., socket.socket]) -> None:
    reply = everything(line(b"\x16\x03\x01\x00\xff\x00\r\n\r\n"))
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


SMALL = """
import uvicorn
from rlhf.serving import descriptors
from rlhf.serving.connections import protocol
from rlhf.serving.server import listen
from tests.serving.test_connections import app

kept = descriptors.available(820)
listener = listen("127.0.0.1", 0, asks=False)
listener.listen(kept.at_once)
print(kept.most, kept.at_once, listener.getsockname()[1], flush=True)
config = uvicorn.Config(app, http=protocol(kept.most), backlog=kept.at_once, lifespan="off", log_level="warning")
uvicorn.Server(config).run([listener])
"""


def limited(files: int, program: str) -> subprocess.Popen[str]:
    """A program that may open so many files."""
    command = ["bash", "-c", f'ulimit -n {files}; exec "$0" -c "$1"', sys.executable, program]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_where_the_system_allows_few_files_as_many_connections_are_kept_as_fit() -> None:
    process = limited(256, SMALL)
    assert process.stdout
    assert process.stderr
    most, at_once, port = map(int, process.stdout.readline().split())
    assert (most, at_once) == (256 - 32 - descriptors.SPARE, 32)
    busy = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(most)]
    for each in busy:
        each.sendall(HEAD.replace(b"content", b"expect: 100-continue\r\ncontent"))
        assert b" 100 " in each.recv(65536)  # it is at work
    flood = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(200)]  # more than there are files
    for each in busy:
        each.sendall(b"well")
        assert b"200 OK" in each.recv(65536)
    for each in flood:
        each.close()
    assert httpx.post(f"http://127.0.0.1:{port}", content=b"well", timeout=60).content == b"well"
    process.terminate()
    assert process.communicate()[1] == ""


def test_where_it_allows_none_that_is_said_at_the_start() -> None:
    said = limited(128, "from rlhf.serving.descriptors import available; available(820)").communicate()[1]
    assert "UserError: the system lets this process open 128 files, which leaves none for a connection" in said.splitlines()[-1]


def test_that_no_file_is_left_is_told_in_a_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, others = asyncio.new_event_loop(), list[dict[str, Any]]()
    monkeypatch.setattr(loop, "default_exception_handler", others.append)
    full: dict[str, Any] = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too many open files")}
    other: dict[str, Any] = {"message": "something else", "exception": OSError(errno.EIO, "Input/output error")}
    for context in (full, other):
        descriptors.told(loop, context)
    loop.close()
    (said,) = caplog.records
    assert (said.getMessage()[:47], said.exc_info) == ("no file is left for another connection (Too man", None)
    assert others == [other]
