"""Where requests come in: whose they are, and whether they are too many or too large."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from fastapi import Depends
from fastapi import Request as Call
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.config.serving import Role
from rlhf.serving.counts import Counts
from rlhf.serving.keys import Caller, Keys
from rlhf.serving.replies import RefusedError

SECONDS_TO_SEND = 30  # a body
MOST_HELD = 256 * 2**20  # bytes of bodies at a time: each stays in memory until its request is answered
READ_ON = 32  # times what is taken: a client that is still sending reads no answer, and would be told of a broken connection alone
# paths that ask for no key; what the pages' scripts ask for needs one
PUBLIC = frozenset({"/health", "/rate", "/figures", "/page/style.css", "/page/common.js", "/page/rate.js", "/page/figures.js"})


class Body:
    """A request's, as far as it may go, counted by the door until it is let go."""

    def __init__(self, door: Door) -> None:
        self._door, self._parts = door, list[bytes]()
        self.size = self._held = 0
        self.no_room = False

    async def read(self, receive: Receive, most: int) -> None:
        """Read it to its end; of one that is too large, or finds no room, nothing is kept.

        Raises:
            ClientDisconnect: the client has left.
        """
        more = True
        while more and self.size <= READ_ON * most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part = message.get("body", b"")
            more, self.size = message.get("more_body", False), self.size + len(part)
            self.no_room = self.no_room or (self.size <= most and self._door.held + len(part) > max(MOST_HELD, most))
            if self.no_room or self.size > most:
                self.let_go()
            else:
                self._parts.append(part)
                self._held += len(part)
                self._door.held += len(part)

    def take(self) -> bytes:
        """The whole of it, once; it is still counted, as who takes it keeps it."""
        whole, self._parts = b"".join(self._parts), []
        return whole

    def let_go(self) -> None:
        self._door.held -= self._held
        self._parts, self._held = [], 0


class Door:
    """Reads a request's body before anything else does, and refuses one that is too large, or of somebody who may not ask.

    Args:
        app: what stands behind it.
        keys: of the server.
        most: bytes of a request for which no key is needed.
        counts: of the server.
    """

    def __init__(self, app: ASGIApp, keys: Keys, most: int, counts: Counts) -> None:
        self._app, self._keys, self._most, self._counts = app, keys, most, counts
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(self)
        try:
            await self._answer(body, scope, receive, send)
        finally:
            body.let_go()

    async def _answer(self, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        error, caller = None, None
        try:
            if scope["path"] not in PUBLIC:
                caller = self._keys.caller(dict(scope["headers"]))
                caller.count()
        except RefusedError as found:
            error = found
        most = caller.most_bytes if caller else self._most
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                await body.read(receive, most)
        except TimeoutError:
            error = error or RefusedError(408, f"the body did not come within {SECONDS_TO_SEND} seconds", "timeout")
        except ClientDisconnect:
            return
        if body.size > most and error is None:
            error = RefusedError(413, f"the body is larger than {most} bytes (max_body_kib of serving or of the key)", "too_large")
        if body.no_room and error is None:
            what = f"requests of {MOST_HELD >> 20} MiB are being answered; try again later"
            error = RefusedError(429, what, "queue_full", headers={"retry-after": "1"})
        if error:
            self._counts.refused.labels(error.status).inc()
            await JSONResponse(error.content, error.status, error.headers)(scope, receive, tell)
            return
        scope.setdefault("state", {})["caller"] = caller
        given: Iterator[Message] = iter([{"type": "http.request", "body": body.take(), "more_body": False}])

        async def again() -> Message:
            return next(given, None) or await receive()

        await self._app(scope, again, tell)


def caller_of(call: Call) -> Caller:
    """Whose request it is."""
    found: Caller = call.state.caller
    return found


def needs(role: Role) -> Any:
    """A route's dependency: the caller's key is for this.

    Args:
        role: that it needs.
    """

    async def check(call: Call) -> None:
        caller_of(call).check(role)

    return Depends(check)
