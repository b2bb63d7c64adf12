"""One request over HTTP: handed to the engine, and its events made into a reply or a stream."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

from rlhf.errors import UserError
from rlhf.serving.bodies import Asked, ChatBody, CompletionBody
from rlhf.serving.encoding import encoded
from rlhf.serving.keys import Caller
from rlhf.serving.mailbox import Mailbox
from rlhf.serving.record import Written
from rlhf.serving.replies import Form, Json, RefusedError, line, usage
from rlhf.serving.requests import BusyError, ClosedError, Event, Piece, Request, Taken, Token
from rlhf.serving.service import Service
from rlhf.serving.traffic import Arm

logger = logging.getLogger(__name__)

Left = Callable[[], Awaitable[bool]]
SHORT, SHORT_TEXT = 8, 1000  # messages, and characters of them
SECONDS_BETWEEN_LOOKS = 0.5  # whether the client is still there
# not the errors themselves: each time that one is raised it would hold on to one request more
SPECIAL = {
    "time": (503, "the answer took longer than serving.seconds", "timeout"),
    "error": (500, "the answer could not be written", "engine_error"),
    "cancelled": (503, "the answer was cancelled", "cancelled"),
}


class Exchange:
    """A request that was taken.

    Args:
        service: that took it.
        arm: that answers.
        body: what the client sent.
        caller: who sent it.
        requests: what the engine is asked, one for each prompt; their answers are numbered through.

    Raises:
        BusyError: too many wait.
        ClosedError: the version has gone.
    """

    def __init__(self, service: Service, arm: Arm, body: Asked, caller: Caller, requests: Sequence[Request]) -> None:
        self.version, self._arm, self._service, self._body, self._requests = arm.version, arm, service, body, requests
        self._caller = caller
        self._begun, self._told = time.monotonic(), False
        self._events = Mailbox(service.bell)
        self._written = [Written() for request in requests for _ in range(request.choices)]
        self._ends, self._finish, self._is_over = 0, "cancelled", False
        self.form = Form(isinstance(body, ChatBody), self.version, uuid.uuid4().hex, int(time.time()))
        self._taken: list[Taken] = []
        try:
            for number, request in enumerate(requests):
                self._taken.append(self.version.engine.submit(request, self._deliver(number * request.choices)))
        except (BusyError, ClosedError):
            self.cancel()
            raise

    def _deliver(self, first: int) -> Callable[[Event], None]:
        """What takes the events of a request, the first of whose answers has this number."""

        def deliver(event: Event) -> None:
            self._events.put(replace(event, choice=first + event.choice) if first else event)

        return deliver

    def cancel(self) -> None:
        """The client has left: the answers end at the next token."""
        for taken in self._taken:
            taken.cancel()

    async def whole(self, left: Left) -> Json:
        """The reply, once all its answers are written.

        Raises:
            RefusedError: they could not be.
        """
        tokens: list[list[Token]] = [[] for _ in self._written]
        async for event in self._all(left):
            if isinstance(event, Piece):
                tokens[event.choice] += event.tokens
        told = [found if self._body.top is not None else None for found in tokens]
        choices = [self.form.choice(i, said.text, told[i], said.finish) for i, said in enumerate(self._written)]
        return self.form.whole(choices, self._usage)

    async def stream(self) -> AsyncIterator[str]:
        """The events of a stream, the last one included. Where the client leaves, this is closed, and the answers end."""
        asks = self._body.stream_options
        choices = range(len(self._written)) if self.form.chat else ()
        # what tells no text goes out with what does: each line by itself would cost as much as several tokens
        held = "".join(line(self.form.chunk(choice, {"role": "assistant", "content": ""})) for choice in choices)
        try:
            async for event in self._all(None):
                if isinstance(event, Piece):
                    tokens = event.tokens if self._body.top is not None else None
                    yield held + line(self.form.chunk(event.choice, {"content": event.text}, tokens))
                    held = ""
                else:
                    held += line(self.form.chunk(event.choice, {}, finish=event.finish))
            if asks and asks.include_usage:
                held += line(self.form.chunk_of([], self._usage))
            yield held + "data: [DONE]\n\n"
        except RefusedError as error:
            yield held + line(error.content)

    @property
    def _usage(self) -> Json:
        return usage(sum(len(request.prompt) for request in self._requests), sum(written.tokens for written in self._written))

    async def _all(self, left: Left | None) -> AsyncIterator[Event]:
        """The events until all answers are over.

        Raises:
            RefusedError: one ended as none should.
        """
        looked = self._begun
        try:
            while self._ends < len(self._written):
                event = None
                with suppress(TimeoutError):
                    event = await asyncio.wait_for(self._events.get(), SECONDS_BETWEEN_LOOKS if left else None)
                if left and time.monotonic() - looked >= SECONDS_BETWEEN_LOOKS:  # though text comes without a pause
                    looked = time.monotonic()
                    if await left():
                        raise RefusedError(*SPECIAL["cancelled"])
                if event:
                    self._note(event)
                    yield event
        finally:
            self.end()

    def end(self) -> None:
        """Nobody waits any more: count and record what came of it, once. A client may leave before a stream has begun."""
        if self._is_over:
            return
        self._is_over = True
        self.cancel()
        counts = self._service.counts
        if self._arm.alias:
            counts.arms.labels(self._arm.alias).inc()
        whole = self._ends == len(self._written) or self._finish in SPECIAL
        counts.requests.labels(self.version.name, self._finish if whole else "cancelled").inc()
        counts.prompts.labels(self.version.name).inc(self._usage["prompt_tokens"])
        counts.answers.labels(self.version.name).inc(self._usage["completion_tokens"])
        self._record()

    def _note(self, event: Event) -> None:
        written, seconds = self._written[event.choice], time.monotonic() - self._begun
        if isinstance(event, Piece):
            if not self._told:
                self._service.counts.first.observe(seconds)
                self._told = True
            written.text += event.text
        else:
            self._ends += 1
            written.finish, written.tokens, written.seconds = event.finish, event.tokens, seconds
            self._finish = event.finish
            if event.finish in SPECIAL:
                raise RefusedError(*SPECIAL[event.finish])

    def _record(self) -> None:
        """Have the answers recorded, those as well that were broken off, and the first one shadowed; where the record takes them."""
        service, body = self._service, self._body
        kept = service.record.takes(body)
        whole = self._written[0].finish in ("stop", "length")
        drawn = self.form.chat and whole and service.traffic.beside(self._arm) is not None and service.shadows.drawn()
        if not kept:
            return
        written = iter(enumerate(self._written))
        for number, request in enumerate(self._requests):
            common = service.record.of_request(body, request, number, self.version) | {"key": self._caller.name, "arm": self._arm.alias}
            for seed, (choice, answer) in enumerate(islice(written, request.choices), request.seed):
                correlation = self.form.id if drawn and choice == 0 else None
                service.record.put(common, self.form.id, choice, self.version, seed, answer, correlation=correlation)
            if drawn:
                service.shadows.ask(body, request.seed, common, self.form.id)


async def begin(service: Service, body: Asked, caller: Caller, wanted: str | None) -> Exchange:
    """Hand a request to the version that it names, or that its conversation is drawn for.

    Args:
        service: that takes it.
        body: what the client sent.
        caller: who sent it.
        wanted: the arm that is to answer, as an administrator may say.

    Raises:
        RefusedError: there is none, the request does not fit it, or it has too much to do.
    """
    if wanted is not None:
        caller.check("administer")
    versions = service.versions
    service.record.takes(body)
    for _ in range(3):  # a version that was found may have gone a moment later
        arm = service.traffic.arm(body, wanted) or await _opened(service, body.model)
        if arm is None and versions.is_awaited(body.model):
            break
        if arm is None:
            ready = ", ".join(versions.names) or "none yet"
            raise RefusedError(404, f"model {body.model!r} is not served; these are: {ready}", "model_not_found", "model")
        given = versions, arm.version, body
        requests = encoded(*given) if _is_short(body) else await asyncio.to_thread(encoded, *given)
        try:
            return Exchange(service, arm, body, caller, requests)
        except BusyError:
            raise RefusedError(429, "too many requests are waiting; try again later", "queue_full", headers={"retry-after": "1"}) from None
        except ClosedError:
            continue
    raise RefusedError(503, "the model is not ready to answer; try again", "busy", headers={"retry-after": "1"})


def _is_short(body: Asked) -> bool:
    """Whether it is encoded in less time than it takes to hand it to a thread and back, while others wait."""
    if isinstance(body, ChatBody):
        return len(body.messages) <= SHORT and sum(len(message.plain["content"]) for message in body.messages) <= SHORT_TEXT
    return isinstance(body, CompletionBody) and isinstance(body.prompt, str) and len(body.prompt) <= SHORT_TEXT


async def _opened(service: Service, name: str) -> Arm | None:
    """A version that was asked for by its number, and is not held ready."""
    async with service.opening:  # one at a time: others must not wait for the threads that it takes
        try:
            version = await asyncio.to_thread(service.versions.open, name)
        except UserError as error:
            logger.error("%s: %s", name, error.what)
            raise RefusedError(503, f"model {name!r} cannot be served; the server's log says why", "model_not_served", "model") from None
    return Arm(version, None) if version else None
