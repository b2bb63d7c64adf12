"""From an engine to the server: what is told of each answer, pieces of text that came close together as one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf.serving.requests import End, Event, Finish, Piece, Token

SECONDS_BETWEEN = 0.05  # pieces, but the first: with many streams most of the time would go into single tokens, and nobody reads so fast
# request, choice, text, tokens, how the answer ended where it has, and its tokens then; pickled in a fifth of the time that events take
Told = tuple[int, int, str, tuple[Token, ...], Finish | None, int]


@dataclass
class _Held:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    count: int = 0


class Outbox:
    """Of one engine, on whose thread it is filled and emptied.

    Args:
        send: what is to go now.
    """

    def __init__(self, send: Callable[[list[Told]], None]) -> None:
        self._send = send
        self._held: dict[tuple[int, int], _Held] = {}  # by request and choice
        self._next: dict[tuple[int, int], float] = {}  # when the next piece may go

    def put(self, request: int, event: Event) -> None:
        held = self._held.setdefault((request, event.choice), _Held())
        if isinstance(event, Piece):
            held.text += event.text
            held.tokens += event.tokens
        else:
            held.finish, held.count = event.finish, event.tokens

    def flush(self) -> None:
        """Send the first piece of an answer and its end at once, and what comes between them once in a while."""
        now = time.monotonic()
        due = [key for key, held in self._held.items() if held.finish or now >= self._next.get(key, 0.0)]
        told: list[Told] = []
        for key in due:
            held = self._held.pop(key)
            self._next[key] = now + SECONDS_BETWEEN
            if held.finish:
                del self._next[key]
            told.append((*key, held.text, tuple(held.tokens), held.finish, held.count))
        if told:
            self._send(told)


def events_of(told: Told) -> list[Event]:
    """The events that were put, as few as may be."""
    _, choice, text, tokens, finish, count = told
    found: list[Event] = [Piece(choice, text, tokens)] if text or tokens else []
    return [*found, End(choice, finish, count)] if finish else found
