"""The pages for raters (`/rate`) and for those who look at the figures (`/figures`), what their scripts ask, and POST /v1/feedback.

Nothing of a text becomes part of a page's markup: scripts put texts in as texts, and the policy that the pages come with lets no other
script run.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi import Request as Call
from fastapi.responses import Response
from pydantic import AfterValidator, Field
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from rlhf.feedback import pairs
from rlhf.feedback.database import Database
from rlhf.feedback.rating import Given, Rater, Shown, StaleError
from rlhf.feedback.recorder import Recorder
from rlhf.feedback.tables import Answer, Choice, Opinion, Pair, held
from rlhf.serving.bodies import Body, Words
from rlhf.serving.door import caller_of, needs
from rlhf.serving.ingesting import Ratings
from rlhf.serving.replies import Json, RefusedError

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
MOST_CHARACTERS = 20_000
SECONDS_TO_WAIT = 3.0  # for an answer that is being recorded: an application may speak of it at once


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("it must be a name of letters that can be printed")
    return text.strip()


Name = Annotated[Words, Field(max_length=60), AfterValidator(_name)]
Long = Annotated[Words, Field(max_length=MOST_CHARACTERS)]
Token = Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,80}$")]


class NextBody(Body):
    rater: Name


class VoteBody(NextBody):
    token: Token
    pair: Annotated[int, Field(ge=0, lt=2**31)]
    choice: Choice
    reason: Annotated[Words, Field(max_length=200)] | None = None
    edit: Long | None = None
    seconds: Annotated[float, Field(ge=0, le=10**7)] | None = None


class UndoBody(NextBody):
    token: Token


class OpinionBody(Body):
    id: Token
    index: Annotated[int, Field(ge=0, lt=1000)] = 0
    thumb: Literal["up", "down"] | None = None
    comment: Long | None = None
    edit: Long | None = None
    token: Token | None = None


def routes(ratings: Ratings, recorder: Recorder) -> APIRouter:
    """The pages, and what they ask."""
    router = APIRouter()
    _add_files(router)

    def named(call: Call, body: NextBody) -> str:
        # whoever has a key rates by its name
        return caller_of(call).name or body.rater

    def do(name: str, work: Callable[[Rater], Pair | None]) -> Json:
        """Some work of a rater's in a transaction, and what they see after it, once it is on the disk."""
        for attempt in (1, 2):
            try:
                with ratings.record.writing() as session:
                    rater = Rater(session, ratings.params, name)
                    again = work(rater)
                    shown = rater.shown(again) if again else _next(rater)
                    return _told(rater, shown)
            except StaleError as error:
                raise RefusedError(409, str(error), "stale") from None
            except IntegrityError:  # the same form came twice at once: the other one is there now
                if attempt == 2:
                    raise
        raise AssertionError

    def _next(rater: Rater) -> Shown | None:
        found = rater.next()
        if found is None and pairs.from_shadows(rater.session):
            found = rater.next()
        return found

    # POST, though it changes nothing: another site's page cannot send JSON here
    @router.post("/rate/next", dependencies=[needs("rate")])
    def next_pair(call: Call, body: NextBody) -> Json:
        return do(named(call, body), lambda rater: None)

    @router.post("/rate/vote", dependencies=[needs("rate")])
    def vote(call: Call, body: VoteBody) -> Json:
        if body.choice == "skip" and not body.reason:
            raise RefusedError(400, "reason: a skip needs one", "invalid_value", "reason")
        if body.edit is not None and (body.choice not in ("a", "b") or not body.edit.strip()):
            raise RefusedError(400, "edit: it is for the better answer, and not empty", "invalid_value", "edit")
        given = Given(body.token, body.pair, body.choice, body.reason, body.edit and body.edit.strip(), body.seconds)
        told = do(named(call, body), lambda rater: rater.rate(given))
        ratings.rated()
        return told

    @router.post("/rate/undo", dependencies=[needs("rate")])
    def undo(call: Call, body: UndoBody) -> Json:
        return do(named(call, body), lambda rater: rater.undo(body.token))

    @router.post("/figures/numbers", dependencies=[needs("administer")])
    def numbers() -> Json:
        from rlhf.feedback.figures import figures  # with pandas, which nothing else here needs

        with ratings.record.reading() as session:
            return figures(session, ratings.params).content

    _add_opinions(router, ratings, recorder)
    return router


def _add_opinions(router: APIRouter, ratings: Ratings, recorder: Recorder) -> None:
    @router.post("/v1/feedback", dependencies=[needs("ask")])
    def opinion(call: Call, body: OpinionBody) -> Json:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while recorder.awaits(body.id):
            if time.monotonic() > deadline:
                raise RefusedError(503, "the answer is still to be recorded; try again", "record_away", headers={"retry-after": "2"})
            time.sleep(0.05)
        return _take_opinion(ratings.record, body, caller_of(call).name)


def _add_files(router: APIRouter) -> None:
    folder = files("rlhf.serving") / "page"
    contents = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name.rpartition(".")[2] in KINDS}

    def reply(name: str) -> Response:
        return Response(contents[name], media_type=KINDS[name.rpartition(".")[2]], headers=HEADERS)

    @router.get("/rate", include_in_schema=False)
    async def rate() -> Response:
        return reply("rate.html")

    @router.get("/figures", include_in_schema=False)
    async def shown() -> Response:
        return reply("figures.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in contents:
            raise RefusedError(404, "no such file", "not_found")
        return reply(name)


def _told(rater: Rater, shown: Shown | None) -> Json:
    last = rater.last
    content: Json = {"rater": rater.name, "done": rater.done, "left": rater.left, "last": last and last.token, "pair": None}
    if shown:
        a, b = shown.texts
        turns = [{"role": str(turn.get("role", "")), "content": str(turn.get("content", ""))} for turn in shown.pair.prompt]
        content["pair"] = {"token": shown.token, "id": shown.pair.id, "prompt": turns, "a": a, "b": b}
    return content


def _take_opinion(record: Database, body: OpinionBody, key: str | None) -> Json:
    """Keep what an application says of an answer; sent again with the same token, it is there once."""
    if body.thumb is None and not (body.comment or body.edit):
        raise RefusedError(400, "give thumb, comment or edit", "invalid_value", "thumb")
    token = body.token or uuid.uuid4().hex
    # two applications may both count 1, 2, 3
    stored = token if key is None else hashlib.sha256(f"{key}\0{token}".encode()).hexdigest()
    thumb = {"up": 1, "down": -1, None: None}[body.thumb]
    for attempt in (1, 2):
        try:
            with record.writing() as session:
                answer = session.scalar(select(Answer).where(Answer.reply == body.id, Answer.choice == body.index, ~Answer.shadow))
                if answer is None or (key is not None and answer.key not in (None, key)):
                    raise RefusedError(404, "no such answer is recorded (serving.keep decides which are)", "not_found", "id")
                before = session.scalar(select(Opinion).where(Opinion.token == stored))
                said = (answer.id, thumb, held(body.comment) or None, held((body.edit or "").strip()) or None)
                if before is None:
                    session.add(Opinion(token=stored, answer_id=said[0], key=key, thumb=thumb, comment=said[2], edit=said[3]))
                elif (before.answer_id, before.thumb, before.comment, before.edit) != said:
                    raise RefusedError(409, "this token was used before, for something else", "stale", "token")
            return {"object": "feedback", "id": body.id, "index": body.index, "token": token}
        except IntegrityError:  # the same came twice at once
            if attempt == 2:
                raise
    raise AssertionError
