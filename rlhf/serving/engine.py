"""Continuous batching for requests that come while others are being answered.

A thread of its own steps the model. A request joins at the next token, and its answers leave their slots when they end, when nobody waits
for them any more, or when their time is over. An answer is a function of the model, its request and its seed alone (rlhf/serving/writer.py,
rlhf/serving/draw.py): whoever is served beside it, it is the same. What nobody waits for (`Request.background`) joins and goes on while no
user waits for anything, in this engine or another one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.rollout.cache import Layer
from rlhf.rollout.sampling import uniforms
from rlhf.serving.draw import draw, log_probs
from rlhf.serving.requests import ClosedError, Deliver, End, Event, Finish, Piece, Request, Token
from rlhf.serving.texts import Text
from rlhf.serving.writer import Writer

logger = logging.getLogger(__name__)

READ = 512  # tokens of prompts that are read at once, before the others go on by one token; but for a longer prompt
NO_TOP = 0
PAUSE = 0.005  # seconds between looks whether users still wait


class Users:
    """Requests of users that are not answered yet, in all engines of a server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def add(self, change: int) -> None:
        with self._lock:
            self.count += change


class Asked:
    """A request that was taken."""

    def __init__(self, request: Request, deliver: Deliver, users: Users) -> None:
        self.request, self.deliver = request, deliver
        self._users, self._left = users, request.choices
        self._count(1)
        self.deadline = time.monotonic() + request.seconds
        self.ended: Finish | None = None  # before its answers have
        self.begun = 0  # choices that have got a slot

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends at the next token."""
        self.ended = self.ended or "cancelled"

    def over(self, now: float) -> Finish | None:
        return self.ended or ("time" if now > self.deadline else None)

    def _count(self, change: int) -> None:
        if not self.request.background:
            self._users.add(change)

    def tell(self, event: Event) -> None:
        """Deliver an event; who cannot take it any more has left."""
        try:
            self.deliver(event)
        except Exception:
            self.cancel()
        if isinstance(event, End):
            self._left -= 1
            if self._left == 0:
                self._count(-1)


@dataclass
class _Answer:
    """One in the making."""

    asked: Asked
    choice: int
    text: Text
    uniforms: list[float]  # one for each token
    last: int = -1
    count: int = 0
    tokens: list[Token] = field(default_factory=list)  # not told yet

    @property
    def held(self) -> int:
        """Tokens whose keys and values its slot holds; the last one drawn is not among them yet."""
        return len(self.asked.request.prompt) + self.count - 1


class Engine:
    """Answers requests with one model.

    Args:
        writer: the model.
        slots: answers at a time.
        threads: of the processor, where the model computes on one.
        users: of all engines; None: it is the only one.
        stepped: called on the engine's thread once the events of a step, or of those who joined, are delivered.
    """

    def __init__(
        self, writer: Writer, slots: int, threads: int, users: Users | None = None, stepped: Callable[[], None] = lambda: None
    ) -> None:
        self._users, self._stepped = users or Users(), stepped
        self.writer, self.slots, self._threads = writer, slots, threads
        self._writing: list[_Answer] = []  # in slot 0, 1, 2, …
        self._waiting: deque[Asked] = deque()
        self._later: deque[Asked] = deque()  # what nobody waits for
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Asked:
        """Have a request answered: `deliver` gets its events, of each choice an `End` as the last one.

        Raises:
            ClosedError: no more are taken.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            asked = Asked(request, deliver, self._users)
            (self._later if request.background else self._waiting).append(asked)
            self._changed.notify()
        return asked

    def close(self) -> None:
        """Take no more requests, answer those that users wait for, and let the model go."""
        with self._changed:
            self._closed = True
            for asked in (*self._later, *(answer.asked for answer in self._writing)):
                if asked.request.background:
                    asked.cancel()
            self._changed.notify()
        self._thread.join()
        self.writer.close()

    @torch.no_grad()
    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                while not (self._for_users or self._free or self._closed):
                    self._changed.wait(PAUSE if self._later or self._writing else None)
                if self._closed and not (self._waiting or self._later or self._writing):
                    return
            try:
                self._step()
            except Exception:  # a fault of one step must not leave everybody waiting for ever
                logger.exception("the engine failed; what was being answered ends with an error")
                while self._writing:
                    self._leave(len(self._writing) - 1, "error")
            self._stepped()

    @property
    def _for_users(self) -> bool:
        return bool(self._waiting) or any(not answer.asked.request.background for answer in self._writing)

    @property
    def _free(self) -> bool:
        """Whether there is something to do that nobody waits for, and no user waits for anything."""
        return bool(self._later or self._writing) and self._users.count == 0

    def _step(self) -> None:
        """Look who has left, let others join, and write one more token of each answer."""
        now = time.monotonic()
        for slot in reversed(range(len(self._writing))):
            if finish := self._writing[slot].asked.over(now):
                self._leave(slot, finish)
        self._drop_waiting(now)
        self._join()
        self._stepped()  # the first text of those who joined does not wait for the others' next token
        if self._writing:
            last, lengths = [answer.last for answer in self._writing], [answer.held for answer in self._writing]
            self._write(self.writer.step(last, lengths), 0)

    def _drop_waiting(self, now: float) -> None:
        with self._changed:
            gone = [(asked, finish) for asked in (*self._waiting, *self._later) if (finish := asked.over(now))]
            for asked, _ in gone:
                (self._later if asked.request.background else self._waiting).remove(asked)
        for asked, finish in gone:
            for choice in range(asked.begun, asked.request.choices):
                asked.tell(End(choice, finish, 0))

    def _line(self) -> deque[Asked] | None:
        """Who joins next, at its head."""
        if self._waiting:
            return self._waiting
        return self._later if self._later and self._free else None

    def _joining(self) -> list[Asked]:
        """Those who join next: as many as there are slots for, with as many tokens as are read at a time."""
        room, read, some = self.slots - len(self._writing), 0, list[Asked]()
        with self._changed:
            line = [*(self._line() or ())]
        for asked in line:
            read += len(asked.request.prompt)
            if room <= 0 or (some and read > READ):
                break
            some.append(asked)
            room -= asked.request.choices - asked.begun
        return some

    def _join(self) -> None:
        """Read the next prompts and begin their answers, as many as there is room for."""
        some = self._joining()
        first = len(self._writing)
        logits = list[Tensor]()
        for asked, found in zip(some, self._read(some), strict=True):
            if found is None:
                asked.ended = "error"
                continue
            layers, next_logits = found
            for choice in range(asked.begun, min(asked.request.choices, asked.begun + self.slots - len(self._writing))):
                self._begin(asked, choice, layers)
                logits.append(next_logits)
            if asked.begun == asked.request.choices:
                with self._changed:
                    (self._later if asked.request.background else self._waiting).remove(asked)
        self._drop_waiting(time.monotonic())
        if logits:
            self._write(torch.stack(logits), first)

    def _read(self, some: list[Asked]) -> list[tuple[list[Layer], Tensor] | None]:
        """What each of some starts from; None where a prompt cannot be read."""
        try:
            return [*self.writer.read([asked.request.prompt for asked in some])] if some else []
        except Exception:
            if len(some) > 1:  # the others are not to suffer for it
                return [found for asked in some for found in self._read([asked])]
            logger.exception("a prompt of %d tokens could not be read", len(some[0].request.prompt))
            return [None]

    def _begin(self, asked: Asked, choice: int, layers: list[Layer]) -> None:
        request = asked.request
        numbers = uniforms([(request.seed + choice) % 2**63], request.max_tokens)[0].tolist()
        self.writer.place(len(self._writing), layers)
        self._writing.append(_Answer(asked, choice, Text(self.writer.tokenizer, request.stops), numbers))
        asked.begun += 1

    def _write(self, logits: Tensor, first: int) -> None:
        """Draw a token for the answer in each slot from `first` on, and tell its text."""
        answers = self._writing[first:]
        requests = [answer.asked.request for answer in answers]
        numbers = torch.tensor([answer.uniforms[answer.count] for answer in answers])
        drawn = draw(logits, numbers, [request.temperature for request in requests], [request.top_p for request in requests])
        wanted = [row for row, request in enumerate(requests) if request.top is not None]
        told = dict(zip(wanted, log_probs(logits[wanted]), strict=True)) if wanted else {}
        over: list[tuple[int, Finish]] = []
        for row, (answer, token) in enumerate(zip(answers, drawn, strict=True)):
            answer.last = token
            answer.count += 1
            if row in told:
                answer.tokens.append(_told(token, told[row], requests[row].top or NO_TOP, answer.text.length))
            if finish := self._told_of(answer, token):
                over.append((first + row, finish))
        for slot, finish in reversed(over):
            self._leave(slot, finish)

    def _told_of(self, answer: _Answer, token: int) -> Finish | None:
        """Tell what a token adds to an answer; how it ends, if it does."""
        request = answer.asked.request
        if token == self.writer.eos_id:
            answer.tokens = answer.tokens[:-1]  # it is no text
            return "stop"
        if text := answer.text.add(token):
            self._tell(answer, text)
        if answer.text.stopped:
            return "stop"
        full = len(request.prompt) + answer.count >= self.writer.capacity
        return "length" if answer.count == request.max_tokens or full else None

    def _tell(self, answer: _Answer, text: str) -> None:
        kept = answer.tokens if not answer.text.stopped else [token for token in answer.tokens if token.start < answer.text.out]
        answer.tokens = []
        if text or kept:
            answer.asked.tell(Piece(answer.choice, text, tuple(kept)))

    def _leave(self, slot: int, finish: Finish) -> None:
        """An answer is over: the last slot's moves into its place."""
        answer, last = self._writing[slot], self._writing[-1]
        if answer is not last:
            self.writer.move(len(self._writing) - 1, slot, last.held)
            self._writing[slot] = last
        self._writing.pop()
        self._tell(answer, answer.text.end())
        if answer.text.stopped and finish == "length":  # it stood in what was held back
            finish = "stop"
        answer.asked.tell(End(answer.choice, finish, answer.count))


def _told(token: int, found: Tensor, top: int, start: int) -> Token:
    values, numbers = found.topk(top)
    return Token(token, float(found[token]), tuple(zip(numbers.tolist(), values.tolist(), strict=True)), start)
