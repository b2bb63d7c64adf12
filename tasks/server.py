"""A Prefect server for a flow that is run by hand, where none is named: it ends with the process that started it, however that ends.

Prefect would start one by itself. That one is left running by a process that SIGTERM or SIGKILL ends, and is hit by Ctrl-C before the
flow can tell it how it ended.

Prefect is imported where it is asked, and not at the top: a server is started before, as both take seconds to load.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError
from rlhf.launcher import processes
from rlhf.locks import lock
from rlhf.redact import redact

HOST = "127.0.0.1"
SECONDS_TO_STOP = 5
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_COME_BACK = 10  # `rlhf serve` starts a server again that has ended
# as Prefect starts its own; uvicorn's command line, without a search for garbage among what is loaded
SERVER = "import gc, uvicorn; gc.set_threshold(100_000); uvicorn.main()"
WORDS = ("--factory", "prefect.server.api.server:create_app", "--lifespan", "on", "--log-level", "error")
_temporary: list[str] = []


@dataclass(frozen=True)
class Own:
    """A server of this process, which may not answer yet; `until_exit` ends it."""

    address: str
    process: subprocess.Popen[bytes]
    until_exit: ExitStack


def lasts() -> bool:
    """Whether flows are told to a server that is there after they have ended, and that somebody may be looking at."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() not in (None, *_temporary)


def check() -> None:
    """See that the server that PREFECT_API_URL names answers.

    Raises:
        UserError: it does not.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    deadline = time.monotonic() + SECONDS_TO_COME_BACK
    while True:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
        if problem is None:
            return
        if time.monotonic() > deadline:
            what = f"PREFECT_API_URL is {redact(str(PREFECT_API_URL.value()))}, where no Prefect server answers ({problem})"
            raise UserError(what, remedy="start that server, or `unset PREFECT_API_URL`: `rlhf run` then finds or starts one for itself")
        time.sleep(0.5)


def start(root: Path) -> Own | None:
    """Start a server that lives as long as this process, unless the environment names one."""
    if os.environ.get("PREFECT_API_URL"):
        return None
    until_exit = ExitStack()
    # after all that this process still sends as it ends
    atexit.register(until_exit.close)
    database = until_exit.enter_context(_database(root))
    leader = until_exit.enter_context(processes.group())
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *WORDS, "--host", HOST, "--port", str(port)],
        # as Prefect's own: no pages, and only the services that a flow needs
        env={"PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}"}
        | os.environ
        | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
        stdin=subprocess.DEVNULL,
        process_group=leader,
    )
    until_exit.callback(_stop, process)
    return Own(f"http://{HOST}:{port}/api", process, until_exit)


def ensure(own: Own | None) -> None:
    """See that there is a server: the one that PREFECT_API_URL names, else `own`, which `start` gave.

    Raises:
        UserError: it does not answer, or does not start.
    """
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )

    if own is None or PREFECT_API_URL.value():  # a profile, or a file of Prefect's, may name one as well
        if own:
            own.until_exit.close()
        check()
        return
    _await(own)
    _temporary.append(own.address)
    # it is of this installation, serves this process alone, and ends with it: nobody asks for its version, or looks whether the flow is
    # alive; a flow run ends half a second later with heartbeats
    settings = {
        PREFECT_API_URL: own.address,
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False,
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    own.until_exit.enter_context(temporary_settings(settings))


@contextmanager
def _database(root: Path) -> Iterator[Path]:
    """A database of its own: SQLite locks out a second server. The file is kept, as it takes long to make."""
    with ExitStack() as to_the_end:
        try:
            to_the_end.enter_context(lock(root, "prefect", refuse="another run's server has it"))
            folder = root / "runs" / "prefect"
        except UserError:
            folder = Path(to_the_end.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-prefect-", ignore_cleanup_errors=True)))
        folder.mkdir(parents=True, exist_ok=True)
        yield folder / "by-hand.db"


def _await(own: Own) -> None:
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

    deadline = time.monotonic() + PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    while own.process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{own.address}/health", timeout=5):
                return
        except OSError:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    raise UserError("Prefect's server does not start", remedy="see what it said above; `rlhf serve` starts one that stays")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
