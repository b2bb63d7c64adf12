"""The assistant's server is killed at random moments while people rate and others ask: what it acknowledged is there, and there once.

python bench/faults/ratings.py                       twenty kills, a random model of the sandbox's shape
python bench/faults/ratings.py --model models/ppo    a trained one

Raters send what the script of `/rate` sends, an application sends thumbs for its answers (POST /v1/feedback), and clients ask without a
pause. Whatever was sent when the server died is sent again to the next one, as its sender cannot know whether it came.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from sqlalchemy import select

from bench.faults.answers import SECONDS, SECONDS_TO_START, Told, asking, at_work, kill, serving
from bench.served import workspace_of
from rlhf import config
from rlhf.feedback import database, pairs
from rlhf.feedback.database import Database
from rlhf.feedback.pairs import Written
from rlhf.feedback.tables import CHOICES, Opinion, Rating

RATERS, PAIRS = 4, 500  # pairs: added before each kill
SECONDS_TO_PAUSE = 0.05  # where nothing is to be rated, or nobody answers
BUSY, UNKNOWN = 503, 404
Body = dict[str, Any]


@dataclass
class Sender:
    """A rater or an application: what was acknowledged, by token, and what was sent and may not have come."""

    name: str
    draw: random.Random
    acknowledged: dict[str, Body] = field(default_factory=dict)
    unsure: Body | None = None
    refused: list[str] = field(default_factory=list)  # why, where it should not have been

    def send(self, line: httpx.Client, path: str, body: Body) -> None:
        """Send something, and keep it as acknowledged or as unsure.

        Raises:
            httpx.HTTPError: it was not acknowledged.
        """
        self.unsure = body
        line.post(path, json=body).raise_for_status()
        self.acknowledged[body["token"]], self.unsure = body, None

    def rate(self, line: httpx.Client) -> None:
        """Rate the next pair, or what was sent before once more."""
        if (body := self.unsure) is None:
            pair = line.post("rate/next", json={"rater": self.name}).raise_for_status().json()["pair"]
            if pair is None:
                time.sleep(SECONDS_TO_PAUSE)
                return
            choice = self.draw.choice(CHOICES)
            body = {"rater": self.name, "token": pair["token"], "pair": pair["id"], "choice": choice}
            body |= {"reason": "unsure"} if choice == "skip" else {"edit": f"better {pair['id']}"} if choice == "a" else {}
        self.send(line, "rate/vote", body)

    def judge(self, line: httpx.Client) -> None:
        """Ask, and say what is thought of the answer, or what was said before once more."""
        again = self.unsure is not None
        if (body := self.unsure) is None:
            asked = {"model": "assistant", "messages": [{"role": "user", "content": "Who?"}], "store": True, "max_tokens": 8}
            reply = line.post("v1/chat/completions", json=asked).raise_for_status().json()["id"]
            body = {"id": reply, "token": f"thumb-{reply}", "thumb": self.draw.choice(("up", "down"))}
        try:
            self.send(line, "v1/feedback", body)
        except httpx.HTTPStatusError as error:
            if not (again and error.response.status_code == UNKNOWN):
                raise
            self.unsure = None  # its answer died with the server before it was recorded, which nobody was told it was


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the model that answers; a random one where none is given.")] = None,
    kills: Annotated[int, typer.Option(help="How often the server is killed.")] = 20,
    clients: Annotated[int, typer.Option(help="That ask at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
) -> None:
    """Kill the server, and say what was lost or doubled. Exit code 1: something was."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = workspace_of(Path(folder) / "work", model and model.resolve())
        raise typer.Exit(disturb(root, kills, clients, random.Random(seed)) > 0)


def disturb(root: Path, kills: int, clients: int, drawn: random.Random) -> int:
    """Kill the server so often; how many things were wrong."""
    record = database.connect(root, config.load(root / "params.yaml"))
    raters = [Sender(f"rater {number}", random.Random(drawn.random())) for number in range(RATERS)]
    application, told, failed = Sender("application", random.Random(drawn.random())), Told(), 0
    works = [*((rater, rater.rate) for rater in raters), (application, application.judge)]
    for number in range(kills):
        fill(record, number)
        with serving(root) as (process, address), asking(address, clients, told), at_work(partial(work, address, *one) for one in works):
            time.sleep(drawn.uniform(*SECONDS))
            wrong = kill(record, process, told, 0)
        wrong += lost(record, raters, application)
        failed += len(wrong)
        ratings, thumbs = sum(len(rater.acknowledged) for rater in raters), len(application.acknowledged)
        unsure = sum(sender.unsure is not None for sender in (*raters, application))
        print(
            f"kill {number + 1}: {ratings} ratings and {thumbs} thumbs acknowledged, {unsure} unsure, {len(wrong)} wrong",
            *wrong,
            sep="\n  ",
        )
    return failed


def fill(record: Database, number: int) -> None:
    """Add pairs to be rated."""
    with record.writing() as session:
        for count in range(PAIRS):
            prompt = [{"role": "user", "content": f"Which, {number}, {count}?"}]
            pairs.add(session, "sample", prompt, (Written("This.", "assistant/1"), Written("That.", "assistant/1")))


def work(address: str, sender: Sender, one: Callable[[httpx.Client], None], stopped: threading.Event) -> None:
    """Have a sender send one thing after the other, whatever becomes of the server."""
    with httpx.Client(base_url=address.removesuffix("/v1"), timeout=SECONDS_TO_START) as line:
        while not stopped.is_set():
            try:
                one(line)
            except httpx.HTTPError as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code != BUSY:
                    sender.refused.append(error.response.text)
                stopped.wait(SECONDS_TO_PAUSE)


def lost(record: Database, raters: list[Sender], application: Sender) -> list[str]:
    """What was acknowledged and is not there as it was sent, and what is there twice or was never sent."""
    with record.reading() as session:
        ratings, opinions = session.scalars(select(Rating)).all(), session.scalars(select(Opinion)).all()
        found = {one.token: (one.rater, one.pair_id, one.choice, one.edit) for one in ratings}
        thumbs = {one.token: (one.answer.reply, {1: "up", -1: "down"}[one.thumb or 0]) for one in opinions}
        sent = {
            token: (body["rater"], body["pair"], body["choice"], body.get("edit"))
            for one in raters
            for token, body in one.acknowledged.items()
        }
        said = {token: (body["id"], body["thumb"]) for token, body in application.acknowledged.items()}
        unsure = {sender.unsure["token"] for sender in (*raters, application) if sender.unsure}
        wrong = [f"{token} was acknowledged as {one}, and is {found.get(token)}" for token, one in sent.items() if found.get(token) != one]
        wrong += [
            f"{token} was acknowledged as {one}, and is {thumbs.get(token)}" for token, one in said.items() if thumbs.get(token) != one
        ]
        doubled = Counter((one.rater, one.pair_id) for one in ratings)
        wrong += [f"{rater} has rated pair {pair} {count} times" for (rater, pair), count in doubled.items() if count > 1]
        twice = Counter(one.answer_id for one in opinions)
        wrong += [f"answer {answer} has {count} thumbs" for answer, count in twice.items() if count > 1]
        wrong += [f"{sender.name} was refused: {said}" for sender in (*raters, application) for said in sender.refused]
        return wrong + [f"{token} was never sent" for token in (found.keys() - sent.keys() | thumbs.keys() - said.keys()) - unsure]


if __name__ == "__main__":
    typer.run(main)
