"""From another thread to the event loop: the events of one request."""

from __future__ import annotations

import asyncio
from collections import deque

from rlhf.serving.requests import Event


class Bell:
    """Tells the loop that it is made in which mailboxes something has come to: however many there are, it is woken once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._for: deque[asyncio.Event] = deque()
        self._rings = False

    def ring(self, came: asyncio.Event) -> None:
        """From any thread."""
        self._for.append(came)
        if not self._rings:
            self._rings = True
            self._loop.call_soon_threadsafe(self._heard)

    def _heard(self) -> None:
        self._rings = False  # first: what comes from now on rings again
        while self._for:
            self._for.popleft().set()


class Mailbox:
    """Made in a loop, which alone may `get`; any thread may `put`.

    Args:
        bell: of the loop; None: one of its own.
    """

    def __init__(self, bell: Bell | None = None) -> None:
        self._bell = bell or Bell()
        self._events: deque[Event] = deque()
        self._came = asyncio.Event()
        self._called = False  # whether the loop knows, or need not know, that there is something

    def put(self, event: Event) -> None:
        self._events.append(event)
        if not self._called:
            self._called = True
            self._bell.ring(self._came)

    async def get(self) -> Event:
        """The next event; it waits for it."""
        while not self._events:
            self._came.clear()
            self._called = False
            if not self._events:  # it may have come between the two
                await self._came.wait()
        return self._events.popleft()
