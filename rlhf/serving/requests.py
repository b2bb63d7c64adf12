"""What is asked of an engine, and what comes of it. It knows neither HTTP nor JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, Protocol

# by itself or at a text to stop at; at its most tokens; or early, as its time is over, nobody waits for it, or something broke
Finish = Literal["stop", "length", "time", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    seconds: float  # from now on, waiting included
    temperature: float = 1.0
    top_p: float = 1.0
    stops: tuple[str, ...] = ()
    choices: int = 1
    top: int | None = None  # likeliest tokens to tell beside each one, with log-probabilities; None: none are wanted
    background: bool = False  # nobody waits for it: it is written while no user waits for anything


@dataclass(frozen=True)
class Token:
    """A token of an answer with its log-probability as the model has it, and the likeliest ones in its place."""

    number: int
    log_prob: float
    top: tuple[tuple[int, float], ...]
    start: int = 0  # characters of the answer before what it adds; of all parts of one character the same


@dataclass(frozen=True)
class Piece:
    """More text of an answer."""

    choice: int
    text: str
    tokens: tuple[Token, ...]  # where they were asked for


@dataclass(frozen=True)
class End:
    """An answer is over; the last of its events."""

    choice: int
    finish: Finish
    tokens: int  # of the answer, the end token included


Event = Piece | End
Deliver = Callable[[Event], None]  # called on a thread of the engine's: it must not wait


class BusyError(Exception):
    """So many requests wait already that no more are taken."""


class ClosedError(Exception):
    """The engine takes no more requests."""


class Taken(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends at the next token."""


class Answers(Protocol):
    """What takes requests: an engine, or what stands for it in another process."""

    def submit(self, request: Request, deliver: Deliver) -> Taken:
        """Have a request answered: `deliver` gets its events, of each choice an `End` as the last one.

        Raises:
            BusyError: too many wait.
            ClosedError: no more are taken.
        """


def events(engine: Answers, request: Request) -> Iterator[Event]:
    """The events of a request as they come, for who may wait."""
    found: SimpleQueue[Event] = SimpleQueue()
    taken, ends = engine.submit(request, found.put), 0
    try:
        while ends < request.choices:
            event = found.get()
            ends += isinstance(event, End)
            yield event
    finally:
        taken.cancel()
