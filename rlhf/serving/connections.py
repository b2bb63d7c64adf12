"""How connections are kept: so many of them, and none for a client that says nothing, or takes nothing of what it asked for.

uvicorn has limits for neither; the body of a request is the door's (rlhf/serving/door.py).
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf.serving.replies import RefusedError

SECONDS_TO_ASK = 30.0  # for the head of a request, from the moment of connecting or of the last answer on
SECONDS_TO_LEAVE = 2.0  # for who was refused: at once they would be told of a broken connection alone, if they are still sending
SECONDS_TO_TAKE = 60.0  # what is sent, before no more is kept for it
TOGETHER = 1 << 16  # bytes at most that go out with what is written after them


class Together:
    """A transport that sends together what is written in one turn of the loop: each sending is a call of the system, and a wait for the
    interpreter's lock after it, while the engine computes.

    Args:
        transport: that sends.
        loop: of it.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append(data)
        self._size += len(data)
        if self._size >= TOGETHER:
            self._send()

    def _send(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if parts:
            self._transport.write(b"".join(parts))

    def write_eof(self) -> None:
        self._send()
        self._transport.write_eof()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def abort(self) -> None:
        """As without this: what was written before has gone out, as far as the client takes it."""
        self._send()
        self._transport.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(H11Protocol):
    """One of a client.

    Args:
        most: connections at a time. Beyond, the one goes that has waited longest without a request; where all are at work, the new one.
        given: as uvicorn has it.
    """

    def __init__(self, *given: Any, most: int, **more: Any) -> None:
        super().__init__(*given, **more)
        self._most = most
        self._idle: asyncio.TimerHandle | None = None  # while no request is being answered
        self._untaken: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(cast(asyncio.Transport, Together(transport, self.loop)))
        self._look()
        if len(self.connections) > self._most:
            waiting = {found: found._idle.when() for found in self.connections if isinstance(found, Connection) and found._idle}
            longest = min(waiting, key=waiting.__getitem__)
            if longest is self:
                self._refuse(RefusedError(503, "there are too many connections; try again", "busy"))
            else:
                self.connections.discard(longest)
                longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in filter(None, (self._idle, self._untaken)):
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken = self.loop.call_later(SECONDS_TO_TAKE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._untaken:
            self._untaken.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(RefusedError(400, msg, "invalid_request"))

    def _look(self) -> None:
        """Count the time while there is no whole request."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._refused:
            return
        if answering and self._idle:
            self._idle.cancel()
            self._idle = None
        elif not (answering or self._idle):
            self._idle = self.loop.call_later(SECONDS_TO_ASK, self._give_up)

    def _give_up(self) -> None:
        if self.transport.is_closing():  # and what was sent last is not taken
            self.transport.abort()
        else:
            self._refuse(RefusedError(408, f"no whole request came within {SECONDS_TO_ASK:.0f} seconds", "timeout"))

    def _refuse(self, error: RefusedError) -> None:
        """Say why, unless an answer has begun, and heed nothing more."""
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.content).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            for part in (h11.Response(status_code=error.status, headers=[*headers.items()]), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        if not self.transport.is_closing():
            self.transport.write_eof()
        if self._idle:
            self._idle.cancel()
        self._idle = self.loop.call_later(SECONDS_TO_LEAVE, self.transport.abort)


def protocol(most: int) -> Any:
    """What uvicorn makes of each connection."""
    return partial(Connection, most=most)
