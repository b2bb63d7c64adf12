"""The process in which all engines of a server are: so they and the server's event loop need not share one interpreter.

The server starts it (rlhf/serving/process.py) and tells it over a socket what to open, answer, give up and close. It ends with the server.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from rlhf.errors import UserError, first_line
from rlhf.serving.engine import Asked, Engine, Users
from rlhf.serving.outbox import Outbox
from rlhf.serving.requests import Request
from rlhf.serving.writer import Writer

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_PULSES = 5.0  # by which the server knows that the process does not stand still


class Core:
    """The engines, and what the server tells them.

    Args:
        connection: to the server.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()
        self._users = Users()
        self._engines: dict[int, tuple[Engine, Outbox]] = {}
        self._asked: WeakValueDictionary[int, Asked] = WeakValueDictionary()  # an engine holds each for as long as it has to do with it

    def run(self) -> None:
        """Do what the server says, until it goes."""
        threading.Thread(target=self._pulse, daemon=True).start()
        told: dict[str, Callable[..., None]] = {"open": self._open, "ask": self._ask, "cancel": self._cancel, "close": self._close}
        while True:
            try:
                what, *given = self._connection.recv()
            except (EOFError, OSError):
                return
            if what == "stop":
                return
            told[what](*given)

    def _pulse(self) -> None:
        while True:
            self._send("here")
            time.sleep(SECONDS_BETWEEN_PULSES)

    def _send(self, *message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)  # it is gone: nobody waits for anything any more

    def _open(self, engine: int, folder: Path, slots: int, most_tokens: int, threads: int) -> None:
        def work() -> None:
            try:
                writer, outbox = Writer(folder, slots, most_tokens), Outbox(partial(self._send, "told"))
                self._engines[engine] = Engine(writer, slots, threads, self._users, outbox.flush), outbox
            except Exception as error:  # of whatever kind: other versions are to be answered with
                self._send("failed", engine, error.what if isinstance(error, UserError) else first_line(error))
                return
            self._send("opened", engine, writer.capacity)

        self._send("begun", engine)
        threading.Thread(target=work, daemon=True).start()  # it takes seconds, in which others are answered

    def _ask(self, engine: int, number: int, request: Request) -> None:
        own, outbox = self._engines[engine]
        self._asked[number] = own.submit(request, partial(outbox.put, number))

    def _cancel(self, number: int) -> None:
        if asked := self._asked.get(number):
            asked.cancel()

    def _close(self, engine: int) -> None:
        def work() -> None:
            try:
                self._engines.pop(engine)[0].close()
            finally:
                self._send("closed", engine)

        threading.Thread(target=work, daemon=True).start()


def main() -> None:
    """What the server starts, with the number of a socket."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    # they reach all processes of a service; the server has this one answer what it took, and then goes
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.excepthook = _failed  # without one of its threads it would let others wait for ever
    try:
        Core(Connection(int(sys.argv[1]))).run()
    except Exception:
        logger.exception("the engines failed")
        os._exit(1)
    os._exit(0)  # whatever is being written


def _failed(what: threading.ExceptHookArgs) -> None:
    logger.error("the engines failed", exc_info=what.exc_value)
    os._exit(1)


if __name__ == "__main__":
    main()
