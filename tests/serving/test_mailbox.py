"""What the engine's thread says reaches the event loop: at once what is first or last, and what comes in between together."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from itertools import repeat
from typing import Any

import pytest

from rlhf.serving import mailbox
from rlhf.serving.mailbox import Bell, Mailbox
from rlhf.serving.requests import End, Event, Piece, Token
from rlhf.serving.server import listen


def heard(events: list[Event]) -> list[Event]:
    """What a loop gets of events that a thread sends."""

    async def main() -> list[Event]:
        box = Mailbox()
        found: list[Event] = []
        threading.Thread(target=lambda: deque(map(box.put, events))).start()
        while not found or not isinstance(found[-1], End):
            found.append(await box.get())
        return found

    return asyncio.run(main())


def test_pieces_that_come_close_together_are_one() -> None:
    pieces: list[Event] = [Piece(number % 2, f"{number} ", (Token(number, 0.0, ()),)) for number in (0, 2, 4, 6, 1, 3, 8)]
    told = [event for event in heard([*pieces, End(0, "stop", 9)]) if isinstance(event, Piece)]
    assert "".join(piece.text for piece in told) == "0 2 4 6 1 3 8 "
    assert [token.number for piece in told for token in piece.tokens] == [0, 2, 4, 6, 1, 3, 8]
    assert all({token.number % 2 for token in piece.tokens} == {piece.choice} for piece in told)
    assert len(told) < len(pieces)


def test_the_first_piece_and_the_end_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "SECONDS_BETWEEN", 60.0)

    async def main() -> None:
        box = Mailbox()
        box.put(Piece(0, "a", ()))
        assert await box.get() == Piece(0, "a", ())
        box.put(Piece(0, "b", ()))
        next_one = asyncio.create_task(box.get())
        await asyncio.sleep(0.05)
        box.put(Piece(0, "c", ()))
        await asyncio.sleep(0.05)
        assert not next_one.done()
        box.put(End(0, "stop", 3))
        assert await next_one == Piece(0, "bc", ())
        assert await box.get() == End(0, "stop", 3)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 30


def test_what_comes_to_many_at_a_time_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop, calls, bell = asyncio.get_running_loop(), list[object](), Bell()
        call = loop.call_soon_threadsafe

        def counted(*given: Any) -> object:
            calls.append(given)
            return call(*given)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        boxes = [Mailbox(bell) for _ in range(20)]
        for _ in range(2):
            waiting = [asyncio.create_task(box.get()) for box in boxes]
            await asyncio.sleep(0)
            thread = threading.Thread(target=lambda: deque(map(Mailbox.put, boxes, repeat(End(0, "stop", 1)))))
            thread.start()
            thread.join()  # the loop cannot have heard of it before
            assert await asyncio.gather(*waiting) == [End(0, "stop", 1)] * 20
        assert len(calls) == 2

    asyncio.run(main())


def test_what_is_sent_goes_out_at_once() -> None:
    with listen("127.0.0.1", 0, asks=False) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio decides that TCP_NODELAY is to be set


def test_pieces_may_come_while_it_looks_for_an_end() -> None:
    async def main() -> None:
        box = Mailbox()

        class Sending(Piece):
            @property  # type: ignore[misc]  # an attribute elsewhere
            def __class__(self) -> type[Piece]:  # type: ignore[override]  # isinstance asks it
                """Asked what it is, another one comes, as from the engine's thread."""
                if len(box._events) < 4:
                    box._events.append(Piece(0, "b", ()))
                return Piece

        box.put(Piece(0, "a", ()))
        assert await box.get() == Piece(0, "a", ())
        box.put(Sending(0, "a", ()))
        event = await box.get()
        assert isinstance(event, Piece)
        assert event.text.startswith("a")

    asyncio.run(main())
