"""The assistant's own server: a process that ends by SIGINT or SIGTERM, after it has answered what it took."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.serving.api import create
from rlhf.serving.connections import protocol
from rlhf.serving.descriptors import RAISE, available
from rlhf.serving.process import EngineProcess
from rlhf.serving.service import Service

SECONDS_TO_END = 10
MORE = 500  # connections than requests that are written or wait: those kept open, those to be told 429, and pages


def serve(root: Path, params: Params, port: int | None, say: Callable[[str], Any], engines: EngineProcess) -> None:
    """Answer until the end.

    Args:
        root: the workspace.
        params: of it.
        port: to listen at, in the place of serving.port.
        say: told where it listens.
        engines: the process that answers.

    Raises:
        UserError: it cannot listen there, or a key cannot be had.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    settings = params.serving
    kept = available(settings.slots + settings.queue + MORE)
    service = Service(root, params, engines)
    listener = listen(settings.host, settings.port if port is None else port, bool(settings.named_keys))
    host, found = listener.getsockname()[:2]
    say(f"assistant http://{host}:{found}/v1 ({settings.asks_for})")
    if kept.most < settings.slots + settings.queue:
        logging.getLogger(__name__).warning(
            "%d connections can be kept, and more are refused (503), though serving.slots + serving.queue is %d: the system lets this "
            "process open no more files; %s",
            *(kept.most, settings.slots + settings.queue, RAISE),
        )
    # a stream that is under way may go on for so long; whoever waits then is told
    options = uvicorn.Config(
        create(service),
        http=protocol(kept.most),
        backlog=kept.at_once,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SECONDS_TO_END,
        server_header=False,
    )
    _Server(options, service).run([listener])


class _Server(uvicorn.Server):
    """uvicorn's, which ends by SIGINT or SIGTERM also while the first versions are being opened."""

    def __init__(self, options: uvicorn.Config, service: Service) -> None:
        super().__init__(options)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if not self.started:
            self._service.versions.give_up()


def listen(host: str, port: int, asks: bool) -> socket.socket:
    """A socket at an address of this machine.

    Args:
        host: the address.
        port: of it; 0: a free one.
        asks: whether a key is needed of those who reach it.

    Raises:
        UserError: the address can be reached from elsewhere without a key, is none, or is taken.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise UserError(f"serving.host: {host} is no address", remedy="give 127.0.0.1") from None
    if not (address.is_loopback or asks):
        what = f"serving.host: {host} can be reached from elsewhere, and whoever reaches it may ask"
        raise UserError(what, remedy="give keys (serving.keys, docs/serving.md), or 127.0.0.1")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) where the socket says that it is TCP's; else the first text waits 40 ms, for an acknowledgement
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(address), port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise UserError(f"serving.host: {host}: {error.strerror}", remedy="give an address of this machine") from None
        raise UserError(
            f"port {port} of {host} is taken", remedy="give another one as serving.port or --port, or 0 for a free one"
        ) from None
    return listener
