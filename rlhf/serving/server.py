"""The assistant's own server: a process that ends by SIGINT or SIGTERM, after it has answered what it took."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.serving.api import create
from rlhf.serving.service import Service

SECONDS_TO_END = 10


def serve(root: Path, params: Params, port: int | None, say: Callable[[str], Any]) -> None:
    """Answer until the end.

    Args:
        root: the workspace.
        params: of it.
        port: to listen at, in the place of serving.port.
        say: told where it listens.

    Raises:
        UserError: it cannot listen there.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    listener = listen(params.serving.host, params.serving.port if port is None else port)
    host, found = listener.getsockname()[:2]
    say(f"assistant http://{host}:{found}/v1 (no key is asked for: every program of this machine may use it)")
    # a stream that is under way may go on for so long; whoever waits then is told
    options = uvicorn.Config(
        create(Service(root, params)), log_level="warning", access_log=False, timeout_graceful_shutdown=SECONDS_TO_END, server_header=False
    )
    uvicorn.Server(options).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine's loopback.

    Raises:
        UserError: the address is another one, or is taken.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise UserError(f"serving.host: {host} is no address", remedy="give 127.0.0.1") from None
    if not address.is_loopback:
        what = f"serving.host: {host} can be reached from elsewhere, and whoever reaches it may ask"
        raise UserError(what, remedy="give 127.0.0.1, and let a proxy that asks for a password stand before it")
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(address), port))
    except OSError:
        listener.close()
        raise UserError(
            f"port {port} of {host} is taken", remedy="give another one as serving.port or --port, or 0 for a free one"
        ) from None
    return listener
