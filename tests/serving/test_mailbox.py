"""What another thread says reaches the event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from itertools import repeat
from typing import Any

import pytest

from rlhf.serving.mailbox import Bell, Mailbox
from rlhf.serving.requests import End, Event, Piece
from rlhf.serving.server import listen


def test_all_that_a_thread_puts_comes_in_its_order() -> None:
    events: list[Event] = [*(Piece(number % 2, f"{number} ", ()) for number in range(1000)), End(0, "stop", 9)]

    async def main() -> list[Event]:
        box = Mailbox()
        threading.Thread(target=lambda: deque(map(box.put, events))).start()
        return [await box.get() for _ in events]

    assert asyncio.run(main()) == events


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
