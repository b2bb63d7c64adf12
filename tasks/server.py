"""A Prefect server for a flow that is run by hand, where none is named: it ends with the process that started it, however that ends.

Prefect would start one by itself. That one is left running by a process that SIGTERM or SIGKILL ends, and is hit by Ctrl-C before the
flow can tell it how it ended.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings

from rlhf.errors import UserError
from rlhf.launcher import processes
from rlhf.locks import lock
from rlhf.redact import redact

HOST = "127.0.0.1"
SECONDS_TO_STOP = 5
SECONDS_TO_COME_BACK = 10  # `rlhf serve` starts a server again that has ended
_temporary: list[str] = []


def lasts() -> bool:
    """Whether flows are told to a server that is there after they have ended, and that somebody may be looking at."""
    return PREFECT_API_URL.value() not in (None, *_temporary)


def check() -> None:
    """See that the server that PREFECT_API_URL names answers.

    Raises:
        UserError: it does not.
    """
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


def ensure(root: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """See that there is a server: the one that PREFECT_API_URL names, else one that lives as long as this process.

    Args:
        meanwhile: what is done while it starts, which takes some seconds.

    Raises:
        UserError: it does not answer, or does not start.
    """
    if PREFECT_API_URL.value():
        check()
        meanwhile()
        return
    until_exit = ExitStack()
    # after all that this process still sends as it ends
    atexit.register(until_exit.close)
    database = until_exit.enter_context(_database(root))
    leader = until_exit.enter_context(processes.group())
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    words = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--lifespan", "on", "--log-level", "error"]
    process = subprocess.Popen(
        [sys.executable, *words, "--host", HOST, "--port", str(port)],
        # as Prefect's own: no pages, and only the services that a flow needs
        env={"PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}"}
        | os.environ
        | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
        stdin=subprocess.DEVNULL,
        process_group=leader,
    )
    until_exit.callback(_stop, process)
    meanwhile()
    address = f"http://{HOST}:{port}/api"
    _await(address, process)
    _temporary.append(address)
    until_exit.enter_context(temporary_settings({PREFECT_API_URL: address}))


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


def _await(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise UserError("Prefect's server does not start", remedy="see what it said above; `rlhf serve` starts one that stays")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
