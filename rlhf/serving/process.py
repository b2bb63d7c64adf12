"""The engines' process, as the server has it: started with it, told what to do, and missed when it dies."""

from __future__ import annotations

import logging
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.errors import UserError
from rlhf.serving.outbox import Told, events_of
from rlhf.serving.requests import BusyError, ClosedError, Deliver, End, Event, Request

if TYPE_CHECKING:  # it imports for seconds, and the process is to start before that
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SECONDS_TO_END = 10
SECONDS_BETWEEN_LOOKS = 1.0
LOOKS = 3  # that find it late: if this process stood still itself, what it was told meanwhile is to be heard first
STANDS = "the engines stand still, and are ended"
GONE = "gone", "the process of the engines has ended"


class UnheardError(UserError):
    """The process ended before it heard what it was to open, which so was not why it ended."""


class AtWork(NamedTuple):
    """What an engine has to do for users."""

    waiting: int  # requests
    writing: int  # answers


class Patience(NamedTuple):
    """Seconds after which the engines are taken to stand still."""

    start: float = 600.0  # its imports
    take: int = 10  # what it is told: the server's event loop waits for that where the socket is full
    late: float = 60.0  # an answer, as the engine looks at the clock between its steps; or any word at all


PATIENCE = Patience()


class EngineProcess:
    """A process with engines (rlhf/serving/core.py). Once it is gone, it stays so: what it was answering has ended with an error.

    One that stands still, as in a GPU's driver, is ended: else nobody would be answered any more.

    Args:
        patience: how long it may.
    """

    def __init__(self, patience: Patience = PATIENCE) -> None:
        self.patience = patience
        own, other = socket.socketpair()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", patience.take, 0))
        with other:
            command = [sys.executable, "-P", "-m", "rlhf.serving.core", str(other.fileno())]
            # a Ctrl-C is the server's, which has it answer what it took; and who reads the server's output waits for the server alone
            apart: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()], **apart)
        self._connection = Connection(own.detach())
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._taken: dict[int, _Taken] = {}
        self._replies: dict[int, SimpleQueue[tuple[str, Any]]] = {}  # to what was asked of an engine as a whole
        self.alive, self._ends = True, False
        self.started = False  # whether it has said a word
        self._begun: set[int] = set()  # engines that it may have ended over, as it began to open them
        self._heard = time.monotonic() + patience.start
        self._hearing = threading.Thread(target=self._hear, name="engines", daemon=True)
        self._hearing.start()
        threading.Thread(target=self._watch, name="engines-watch", daemon=True).start()

    def open(self, folder: Path, slots: int, queue: int, most_tokens: int, threads: int) -> EngineClient:
        """An engine for the model in a folder, ready to answer.

        Args:
            folder: of a language model.
            slots: answers at a time.
            queue: requests that wait at most.
            most_tokens: of a prompt with its answer; fewer where the model takes fewer.
            threads: of the processor, where the model computes on one.

        Raises:
            UnheardError: the process ended, and not over this model.
            UserError: it cannot be opened.
        """
        from rlhf.models.tokenizer import load_tokenizer

        tokenizer, number = load_tokenizer(folder), next(self._numbers)
        said, what = self._ask_engine(number, "open", folder, slots, most_tokens, threads)
        if said != "opened":
            refusal = UnheardError if said == GONE[0] and number not in self._begun else UserError
            raise refusal(what, remedy="bring back its files, or see that it has memory enough")
        return EngineClient(self, number, tokenizer, what, slots, queue)

    def close(self, number: int, until: float) -> None:
        """Let an engine end what users wait for, and go.

        Args:
            number: of the engine.
            until: when it must have done so (`time.monotonic`).
        """
        self._ask_engine(number, "close", until=until)

    def stop(self) -> None:
        """End the process; the engines have been closed."""
        with self._lock:
            self._ends = True
            self._send("stop")
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._hearing.join()

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        self._ends = True
        self._process.kill()

    def submit(self, engine: int, request: Request, deliver: Deliver) -> _Taken:
        """Hand a request to an engine.

        Raises:
            ClosedError: the process is gone.
        """
        with self._lock:
            if not self.alive:
                raise ClosedError
            taken = _Taken(self, next(self._numbers), request, deliver)
            self._taken[taken.number] = taken
            self._send("ask", engine, taken.number, request)
        return taken

    def cancel(self, number: int) -> None:
        with self._lock:
            if number in self._taken:
                self._send("cancel", number)

    def forget(self, number: int) -> None:
        self._taken.pop(number, None)

    def _ask_engine(self, number: int, *message: Any, until: float | None = None) -> tuple[str, Any]:
        """Tell an engine something, and wait for what comes of it."""
        reply: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        with self._lock:
            if not self.alive:
                return GONE
            self._replies[number] = reply
            what, *given = message
            self._send(what, number, *given)
        try:
            return reply.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
        except Empty:
            logger.error("an engine does not close: %s", STANDS)
            self._begun.clear()
            self._process.kill()
            return reply.get()

    def _send(self, *message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:  # it is gone, which is heard in a moment; or it takes nothing, or half a message
            self._process.kill()

    def _watch(self) -> None:
        late = 0
        while self.alive:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = time.monotonic()
            stands = now > self._heard + self.patience.late or any(now > taken.deadline for taken in [*self._taken.values()])
            late = late + 1 if stands else 0
            if late == LOOKS:
                logger.error("what should have come %.0f seconds ago has not: %s", self.patience.late, STANDS)
                self._process.kill()

    def _hear(self) -> None:
        try:
            while True:
                what, *given = self._connection.recv()
                self._heard = max(self._heard, time.monotonic())
                if what == "told":
                    self._deliver(given[0])
                elif what == "here":
                    self._heard, self.started = time.monotonic(), True
                elif what == "begun":
                    self._begun.add(given[0])
                else:
                    number, *more = given
                    self._replies.pop(number).put((what, more[0] if more else None))
        except (EOFError, OSError):
            pass
        finally:
            self._gone()

    def _deliver(self, told: Sequence[Told]) -> None:
        for each in told:
            if taken := self._taken.get(each[0]):
                for event in events_of(each):
                    taken.tell(event)

    def _gone(self) -> None:
        """Nobody is to wait for what does not come any more."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_END)
        self._process.kill()
        code = self._process.wait()
        with self._lock:
            self.alive = False
            self._connection.close()
        if not self._ends:
            logger.error("the process of the engines ended by itself (%d); what was being answered ends with an error", code)
        for taken in [*self._taken.values()]:
            for choice in sorted(taken.open):
                taken.tell(End(choice, "error", 0))
        for reply in self._replies.values():
            reply.put(GONE)


class _Taken:
    """A request that an engine in the process has."""

    def __init__(self, process: EngineProcess, number: int, request: Request, deliver: Deliver) -> None:
        self._process, self.number, self._deliver = process, number, deliver
        self.deadline = time.monotonic() + request.seconds + process.patience.late
        self.open = set(range(request.choices))  # that are not over

    def cancel(self) -> None:
        self._process.cancel(self.number)

    def tell(self, event: Event) -> None:
        """Deliver an event; who cannot take it any more has left."""
        if isinstance(event, End):
            self.open.discard(event.choice)
        try:
            self._deliver(event)
        except Exception:
            self.cancel()
        if not self.open:
            self._process.forget(self.number)
            self._deliver = _nobody  # what waited for it is not to be held on to


def _nobody(_: Event) -> None:
    pass


class EngineClient:
    """One engine of the process, as requests are handed to it.

    Args:
        process: that it is in.
        number: of it there.
        tokenizer: of its model.
        capacity: tokens of a prompt with its answer.
        slots: answers at a time.
        queue: requests that wait at most.
    """

    def __init__(
        self, process: EngineProcess, number: int, tokenizer: PreTrainedTokenizerBase, capacity: int, slots: int, queue: int
    ) -> None:
        self.tokenizer, self.capacity = tokenizer, capacity
        self._process, self._number, self._slots, self._queue = process, number, slots, queue
        self._taken: list[_Taken] = []  # of users, in their order
        self._lock = threading.Lock()
        self._closed, self._over = False, threading.Event()

    @property
    def alive(self) -> bool:
        """Whether it can answer at all."""
        return self._process.alive

    @property
    def at_work(self) -> AtWork:
        """As the engine has it or will in a moment: slots are given to the requests in their order."""
        waiting, room = 0, self._slots
        with self._lock:
            self._taken = [taken for taken in self._taken if taken.open]
            for taken in self._taken:
                count = len(taken.open)
                waiting += count > room
                room -= min(count, room)
        return AtWork(waiting, self._slots - room)

    def submit(self, request: Request, deliver: Deliver) -> _Taken:
        """Have a request answered: `deliver` gets its events, of each choice an `End` as the last one.

        Raises:
            BusyError: too many wait.
            ClosedError: no more are taken.
        """
        if not request.background and self.at_work.waiting >= self._queue:
            raise BusyError
        with self._lock:
            if self._closed:
                raise ClosedError
            taken = self._process.submit(self._number, request, deliver)
            if not request.background:
                self._taken.append(taken)
        return taken

    def close(self) -> None:
        """Take no more requests, and go once those are answered that users wait for."""
        with self._lock:
            first, self._closed = not self._closed, True
            taken = [taken.deadline for taken in self._taken if taken.open]
        if first:
            self._process.close(self._number, max(taken, default=time.monotonic() + self._process.patience.late))
            self._over.set()
        self._over.wait()
