"""The assistant's server is killed at random moments under load: what it has recorded stays, each answer once.

python bench/faults/answers.py WORKSPACE --kills 20        a workspace with a champion; its record is added to

Clients ask without a pause, every request with `store: true`. What the server has counted as recorded (`rlhf_recorded`) and what somebody
has read in the record has to be there after the kill, with the text that the client got; nothing may be there twice, or without its like.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from sqlalchemy import func, select, text

from bench.clone import REPOSITORY
from rlhf import config
from rlhf.feedback import database
from rlhf.feedback.database import Database
from rlhf.feedback.tables import Answer

SECONDS = 2.0, 8.0  # from the load's beginning to the kill
SECONDS_TO_START = 120


@dataclass
class Told:
    """What clients were answered: id and text of each reply."""

    replies: dict[str, str] = field(default_factory=dict)
    failed: int = 0


def main(
    root: Annotated[Path, typer.Argument(help="A workspace with a champion.")],
    kills: Annotated[int, typer.Option(help="How often the server is killed.")] = 20,
    clients: Annotated[int, typer.Option(help="That ask at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
) -> None:
    """Kill the server, and say what was lost. Exit code 1: something was."""
    drawn, told, failed = random.Random(seed), Told(), 0
    record = database.connect(root, config.load(root / "params.yaml"))
    for number in range(kills):
        before = count(record)
        with serving(root.resolve()) as (process, address), asking(address, clients, told):
            time.sleep(drawn.uniform(*SECONDS))
            wrong = kill(record, process, told, before + counted(address))
        failed += len(wrong)
        print(
            f"kill {number + 1}: {len(told.replies)} answers, {count(record)} recorded, {len(wrong)} wrong", *wrong, sep="\n  ", flush=True
        )
    raise typer.Exit(failed > 0)


@contextmanager
def serving(root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server, answering, and its address."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "rlhf.cli", "serve", "--only", "assistant", "--port", "0"]
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found, "the server does not start"
    deadline = time.monotonic() + SECONDS_TO_START
    try:
        while not _well(found[0]):
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def _well(address: str) -> bool:
    try:
        return httpx.get(address.removesuffix("/v1") + "/health").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def asking(address: str, clients: int, told: Told, **headers: str) -> Iterator[None]:
    """Clients that ask all the time, until the block ends."""

    def client(number: int, stopped: threading.Event) -> None:
        with httpx.Client(base_url=address, timeout=SECONDS_TO_START, headers=headers) as line:
            while not stopped.is_set():
                content = [{"role": "user", "content": f"What is {number}?"}]
                body: dict[str, Any] = {
                    "model": "assistant",
                    "messages": content,
                    "store": True,
                    "max_tokens": 16,
                    "user": f"user {number}",
                }
                try:
                    reply = line.post("chat/completions", json=body).raise_for_status().json()
                except httpx.HTTPError:
                    told.failed += 1
                    stopped.wait(0.05)
                    continue
                told.replies[reply["id"]] = reply["choices"][0]["message"]["content"].replace("\0", "\ufffd")  # as databases have it

    with at_work(partial(client, number) for number in range(clients)):
        yield


@contextmanager
def at_work(works: Iterable[Callable[[threading.Event], None]]) -> Iterator[None]:
    """A thread for each of some works, which go on until they are told that the block has ended."""
    stopped = threading.Event()
    threads = [threading.Thread(target=work, args=(stopped,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def counted(address: str) -> int:
    """Answers that the server says it has recorded."""
    found = re.search(r"^rlhf_recorded_total (\S+)", httpx.get(address.removesuffix("/v1") + "/metrics").text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def count(record: Database) -> int:
    """Answers that the record holds, shadows included."""
    with record.reading() as session:
        return session.scalar(select(func.count()).select_from(Answer)) or 0


def kill(record: Database, process: subprocess.Popen[str], told: Told, least: int) -> list[str]:
    """Kill the server; what is wrong with the record then.

    Args:
        record: of the server.
        process: of it.
        told: what clients were answered.
        least: answers that are recorded by now.
    """
    before = texts(record)
    process.send_signal(signal.SIGKILL)
    process.wait()
    after = texts(record)
    wrong = [f"{reply} was recorded and is no more" for reply in before.keys() - after.keys()]
    wrong += [
        f"{reply} is recorded with another text: {after[reply]!r} for {said!r}"
        for reply, said in list(told.replies.items())
        if after.get(reply, said) != said
    ]
    wrong += [f"{least} were counted, and {found} are there"] if (found := count(record)) < least else []
    return wrong + _damage(record)


def texts(record: Database) -> dict[str, str]:
    """What is recorded, by reply."""
    with record.reading() as session:
        return dict(session.execute(select(Answer.reply, Answer.text).where(Answer.choice == 0)).tuples().all())


def _damage(record: Database) -> list[str]:
    """Answers that are there twice, shadows of nothing, and what SQLite says of its file."""
    own = select(Answer.reply).where(~Answer.shadow)
    doubled = select(Answer.reply).group_by(Answer.reply, Answer.choice).having(func.count() > 1)
    alone = select(Answer.reply).where(Answer.shadow, Answer.correlation.not_in(own))
    with record.reading() as session:
        wrong = [f"{reply} is there twice" for reply in session.scalars(doubled)]
        wrong += [f"{reply} is the shadow of nothing" for reply in session.scalars(alone)]
        if record.engine.dialect.name == "sqlite" and (said := session.scalar(text("PRAGMA integrity_check"))) != "ok":
            wrong.append(f"the file is damaged: {said}")
    return wrong


if __name__ == "__main__":
    typer.run(main)
