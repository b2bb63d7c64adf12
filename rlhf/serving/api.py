"""The server's interface, as OpenAI's: what clients of theirs ask, and errors in their form."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from rlhf.errors import UserError, first_line
from rlhf.feedback.database import is_away
from rlhf.serving import descriptors, pages
from rlhf.serving.bodies import Asked, ChatBody, CompletionBody
from rlhf.serving.counts import Counts
from rlhf.serving.door import Door, caller_of, needs
from rlhf.serving.exchange import Exchange, begin
from rlhf.serving.replies import Json, RefusedError
from rlhf.serving.schema import ERRORS, HEALTH, ChatReply, ListedModel, ModelsReply, TextReply, answered
from rlhf.serving.service import Service
from rlhf.serving.versions import Version

logger = logging.getLogger(__name__)
INSIDE = re.compile(r"(function-\w+|list)\[")  # where a field takes one of several: how pydantic calls which of them it tried
JSON = re.compile(r"\s*application/([\w.+-]+\+)?json\s*(;|$)", re.IGNORECASE)


def create(service: Service) -> FastAPI:
    """The application; it opens the versions as it starts, and closes them as it ends."""
    versions, counts = service.versions, service.counts

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(descriptors.told)
        service.start()
        yield
        await asyncio.to_thread(service.stop)  # meanwhile, requests that are given up cancel their answers

    # the pages of documentation would load their scripts from elsewhere, and a redirect would repeat what the client calls this host
    app = FastAPI(title="rlhf", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False, responses=ERRORS)
    app.add_middleware(Door, keys=service.keys, most=service.settings.max_body_kib * 1024, counts=counts)
    _answer_errors(app, counts)

    async def reply(call: Call, body: Asked) -> Response:
        exchange = await begin(service, body, caller_of(call), call.headers.get("x-arm"))
        head = {"x-model-version": exchange.version.name}
        if body.stream:
            head["cache-control"] = "no-cache"
            return Events(exchange, head)
        return JSONResponse(await exchange.whole(call.is_disconnected), headers=head)

    app.include_router(pages.routes(service.ratings, service.record.recorder))

    @app.post("/v1/chat/completions", dependencies=[needs("ask")], responses=answered(ChatReply))
    async def chat(call: Call, body: ChatBody) -> Response:
        return await reply(call, body)

    @app.post("/v1/completions", dependencies=[needs("ask")], responses=answered(TextReply))
    async def complete(call: Call, body: CompletionBody) -> Response:
        return await reply(call, body)

    @app.get("/v1/models", dependencies=[needs("ask")], responses={200: {"model": ModelsReply}})
    async def models() -> Json:
        return {"object": "list", "data": [_listed(name, version) for name, version in versions.names.items()]}

    @app.get("/v1/models/{name:path}", dependencies=[needs("ask")], responses={200: {"model": ListedModel}})
    async def model(name: str) -> Json:
        if version := versions.names.get(name):
            return _listed(name, version)
        raise RefusedError(404, f"model {name!r} is not served", "model_not_found", "model")

    @app.get("/health", responses=HEALTH)
    async def health(call: Call) -> JSONResponse:
        ready = {alias: version.name for alias, version in versions.by_alias.items() if version.engine.alive}
        content: Json = {"status": "ok" if ready else "no version is served"}
        if service.keys.knows(dict(call.scope["headers"])):
            content |= {"versions": ready, "problems": service.problems, "warnings": service.warnings}
        return JSONResponse(content, 200 if ready else 503)

    @app.get("/metrics", dependencies=[needs("administer")], response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(counts.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _listed(name: str, version: Version) -> Json:
    return {"id": name, "object": "model", "created": version.created, "owned_by": "rlhf", "version": version.name}


class Events(StreamingResponse):
    """The stream of an exchange, which ends with it, though the client has left before it began."""

    def __init__(self, exchange: Exchange, head: Mapping[str, str]) -> None:
        super().__init__(exchange.stream(), media_type="text/event-stream", headers=head)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(self.listen_for_disconnect(receive))
        leaving.add_done_callback(lambda _: self._exchange.cancel())
        try:
            await self.stream_response(send)
        finally:
            leaving.cancel()
            self._exchange.end()

    async def stream_response(self, send: Send) -> None:
        """The head goes out with the first text."""
        begin: Message | None = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        async for text in self.body_iterator:
            if begin:
                await send(begin)
                begin = None
            await send({"type": "http.response.body", "body": str(text).encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _answer_errors(app: FastAPI, counts: Counts) -> None:
    """Have every error told in OpenAI's form."""

    def told(error: RefusedError, head: Mapping[str, str] | None = None) -> JSONResponse:
        if error.code != "cancelled":  # nobody was there to be told
            counts.refused.labels(error.status).inc()
        return JSONResponse(error.content, error.status, {**(head or {}), **error.headers})

    @app.exception_handler(RefusedError)
    async def refused(_: Call, error: RefusedError) -> JSONResponse:
        return told(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(call: Call, error: RequestValidationError) -> JSONResponse:
        # where a field takes one of several, the one that went furthest says what is wrong
        first: dict[str, Any] = dict(max(error.errors(), key=lambda each: len(each["loc"])))
        if call.method == "POST" and not JSON.match(call.headers.get("content-type", "")):
            return told(RefusedError(400, "the header content-type must be application/json", "invalid_content_type"))
        place = [str(part) for part in first["loc"][1:] if not INSIDE.match(str(part))]
        if first["type"] == "json_invalid":
            return told(RefusedError(400, "the body is no JSON", "invalid_json"))
        param = ".".join(place) or None
        said = "this field is not known here" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        return told(RefusedError(400, f"{param}: {said}" if param else said, "invalid_value", param))

    @app.exception_handler(HTTPException)
    async def other(_: Call, error: HTTPException) -> JSONResponse:
        return told(RefusedError(error.status_code, str(error.detail)), error.headers)

    @app.exception_handler(UserError)
    @app.exception_handler(SQLAlchemyError)
    async def away(_: Call, error: Exception) -> JSONResponse:
        if not is_away(error):
            raise error
        logger.warning("record: %s", first_line(error))
        what = "the record of answers and ratings is away or locked; nothing was changed, try again"
        return told(RefusedError(503, what, "record_away", headers={"retry-after": "2"}))

    @app.exception_handler(Exception)
    async def fault(_: Call, error: Exception) -> JSONResponse:
        return told(RefusedError(500, "the server failed; its log says how"))
