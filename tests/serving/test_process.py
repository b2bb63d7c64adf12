"""The engines' process: what is answered there, how many wait, and what becomes of it all when it dies."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest

from rlhf.errors import UserError
from rlhf.serving.engine import Engine
from rlhf.serving.process import EngineClient, EngineProcess, Patience, UnheardError
from rlhf.serving.requests import BusyError, ClosedError, End, Event
from tests.serving.test_engine import ASKED, answers, some_requests

LONG = replace(ASKED, max_tokens=120, choices=4)
PATIENCE = 60


@pytest.fixture(scope="module")
def process() -> Iterator[EngineProcess]:
    found = EngineProcess()
    yield found
    found.stop()
    assert not found.alive


@pytest.fixture
def client(process: EngineProcess, folder: Path) -> Iterator[EngineClient]:
    found = process.open(folder, 8, 2, 128, 1)
    yield found
    found.close()


def ends(told: SimpleQueue[Event], count: int) -> list[End]:
    """The first ends that come."""
    found: list[End] = []
    while len(found) < count:
        event = told.get(timeout=PATIENCE)
        found += [event] if isinstance(event, End) else []
    return found


def test_it_answers_what_an_engine_in_this_process_answers(process: EngineProcess, folder: Path, engine: Engine) -> None:
    client, requests = process.open(folder, 8, 100, 128, 1), some_requests()
    expected = [answers(engine, request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as at_once:
        assert list(at_once.map(partial(answers, client), requests)) == expected  # log-probabilities, too
    assert client.at_work == (0, 0)
    beyond = answers(client, replace(ASKED, prompt=(10**9,)))  # no token
    assert beyond[0][1].finish == "error"
    client.close()
    with pytest.raises(ClosedError):
        client.submit(ASKED, print)


def test_the_queue_is_bounded_and_who_leaves_makes_room(client: EngineClient) -> None:
    told: SimpleQueue[Event] = SimpleQueue()
    taken = [client.submit(LONG, told.put) for _ in range(4)]  # two in the slots, two wait
    assert client.at_work == (2, 8)
    with pytest.raises(BusyError):
        client.submit(ASKED, told.put)
    aside = client.submit(replace(LONG, background=True), told.put)  # which takes no room from users
    for asked in (*taken, aside):
        asked.cancel()
    assert len(ends(told, 20)) == 20
    assert client.at_work == (0, 0)
    assert answers(client, ASKED)[0][1].finish in ("stop", "length")
    taken[0].cancel()  # what is over


def test_one_that_closes_answers_what_it_took_while_another_goes_on(process: EngineProcess, folder: Path, client: EngineClient) -> None:
    other, told = process.open(folder, 8, 40, 128, 1), SimpleQueue[Event]()
    for seed in range(10):
        other.submit(replace(ASKED, seed=seed), told.put)
    closing = threading.Thread(target=other.close)
    closing.start()
    assert answers(client, ASKED)[0][1].finish in ("stop", "length")
    assert {end.finish for end in ends(told, 10)} <= {"stop", "length"}
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_a_folder_that_holds_no_model_is_refused_and_others_answer(process: EngineProcess, client: EngineClient, folder: Path) -> None:
    damaged = folder.parent / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be a causal language model"):
        process.open(damaged, 8, 2, 128, 1)
    assert answers(client, ASKED)[0][1].finish in ("stop", "length")


def test_when_it_dies_nobody_waits_for_ever(folder: Path) -> None:
    process, told = EngineProcess(), SimpleQueue[Event]()
    client = process.open(folder, 8, 2, 128, 1)
    for _ in range(3):
        client.submit(LONG, told.put)
    opening = ThreadPoolExecutor(1).submit(process.open, folder, 8, 2, 128, 1)
    process._process.kill()
    assert "error" in {end.finish for end in ends(told, 12)}
    with pytest.raises(UserError, match="has ended"):
        opening.result(PATIENCE)
    assert not client.alive
    with pytest.raises(ClosedError):
        client.submit(ASKED, told.put)
    client.close()
    process.stop()


@pytest.mark.parametrize("many", [0, 1, 3000])  # what is being opened; an answer that has not ended by its time; more than the socket holds
def test_when_it_stands_still_it_is_ended(folder: Path, many: int) -> None:
    process, told = EngineProcess(Patience(take=1)), SimpleQueue[Event]()
    client = process.open(folder, 8, 10_000, 128, 1)
    process._process.send_signal(signal.SIGSTOP)
    process.patience = Patience(take=1, late=1000.0 if many > 1 else 3.0)
    if many == 0:
        with pytest.raises(UnheardError, match="has ended"):  # it stood still before
            process.open(folder, 8, 2, 128, 1)
        assert process.started
    with suppress(ClosedError):  # the rest of them
        for _ in range(many):
            client.submit(replace(LONG, seconds=1.0, prompt=tuple(range(100))), told.put)
    if many:
        assert ends(told, 4)[-1].finish == "error"
    assert process._process.wait(PATIENCE) == -signal.SIGKILL
    process.stop()
    assert not client.alive


def test_what_was_being_opened_as_it_came_to_stand_still_may_be_why(folder: Path) -> None:
    process = EngineProcess()
    with ThreadPoolExecutor(1) as opening:
        opened = opening.submit(process.open, folder, 8, 2, 128, 1)
        while not process._begun:
            assert not opened.done()
            time.sleep(0.001)
        process._process.send_signal(signal.SIGSTOP)
        process.patience = Patience(late=3.0)
        with pytest.raises(UserError, match="has ended") as refused:
            opened.result(PATIENCE)
    assert refused.type is UserError
    process.stop()


def test_one_that_does_not_close_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.serving.process.LOOKS", 1000)  # so that nothing else ends it
    process = EngineProcess(Patience(late=1.0))
    client = process.open(folder, 8, 2, 128, 1)
    process._process.send_signal(signal.SIGSTOP)
    client.close()
    assert process._process.wait(PATIENCE) == -signal.SIGKILL
    process.stop()


def test_it_goes_with_a_server_that_is_killed(process: EngineProcess) -> None:
    code = "from rlhf.serving.process import EngineProcess as E; import time; print(E()._process.pid, flush=True); time.sleep(600)"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    engines = psutil.Process(int(server.stdout.readline()))
    server.kill()
    engines.wait(5 * PATIENCE)  # once it has imported: until then it does not look
    assert server.wait(PATIENCE) < 0
    assert process.alive
