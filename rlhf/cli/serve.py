"""`rlhf serve`: Prefect's server, a worker for the deployments of prefect.yaml, MLflow's pages and the assistant, all on the loopback.

Home, names and ports are the workspace's own (rlhf/workspace/served.py), so that several are served side by side.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from rlhf import config, tracking
from rlhf.errors import UserError
from rlhf.launcher import processes
from rlhf.locks import lock
from rlhf.workspace import served

HOST = "127.0.0.1"
USUAL_PORTS = {"prefect": 4200, "mlflow": 5000}
SECONDS_TO_START = 600
SECONDS_TO_EXEC = 0.5  # from a process's fork until it has the command line that it is known by
MOST_ENDS, WITHIN_SECONDS = 5, 120  # a part that ends so often in so short a time would end for ever


def serve(
    root: Path, params: config.Params, prefect_port: int | None, mlflow_port: int | None, port: int | None, say: Callable[[str], Any]
) -> None:
    """Start all, tell the addresses, and stay until SIGINT or SIGTERM; nothing is left running then.

    Raises:
        UserError: the workspace is served already, a port is taken, a part did not start, or ended again and again; one that ends now and
            then, however that is, is started again.
    """
    with ExitStack() as to_the_end:
        to_the_end.enter_context(lock(root, served.LOCK, refuse=f"{root} is being served already"))
        served.forget(root)
        to_the_end.callback(served.forget, root)
        ports = {name: choose_port(name, port, to_the_end) for name, port in (("prefect", prefect_port), ("mlflow", mlflow_port))}
        api, pages = (f"http://{HOST}:{port}" for port in ports.values())
        own = choose_port("assistant", port, to_the_end, params.serving.port)
        tracking.initialise(root, params)  # before two processes find no database
        to_the_end.enter_context(processes.stoppable())
        parts = Parts(root, _environment(root, f"{api}/api", pages))
        parts.group = to_the_end.enter_context(processes.group())
        try:
            uri = tracking.tracking_uri(root, params)
            start(root, parts, ports, uri)
            # it opens versions as there come to be some, so nothing here waits for it
            parts.start("assistant", "rlhf", "serve", "--only", "assistant", "--port", str(own))
            served.write(root, f"{api}/api", pages)
            say(f"Prefect   {api}")
            say(f"MLflow    {tracking.page(None, root, params, pages)}")
            say(f"assistant http://{params.serving.host}:{own}/v1 ({params.serving.asks_for})")
            say(f"worker    of pool {served.name(root)}; logs in {parts.logs.relative_to(root)}")
            say("`rlhf run` and `rlhf ingest` in this workspace are seen there, and the nightly run is started by hand with:")
            say(f"PREFECT_API_URL={api}/api prefect deployment run retrain/{served.deployment(root)}")
            while True:
                time.sleep(1)
                for name in parts.ended():
                    if name != "worker" or end_dead_runs(f"{api}/api"):
                        parts.start_again(name, say)
        except processes.Stopped:
            served.forget(root)
            say("stopped")
    parts.wait()


def start(root: Path, parts: Parts, ports: Mapping[str, int], uri: str) -> None:
    """Start the parts, and deploy what prefect.yaml describes.

    Args:
        root: the workspace.
        parts: to start.
        ports: of Prefect's server and of MLflow's.
        uri: of MLflow; an own server for its pages is started where that is a database.

    Raises:
        UserError: one does not start, or prefect.yaml is wrong.
    """
    environment, pool = parts.environment, served.name(root)
    parts.start("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(ports["prefect"]))
    if not uri.startswith("http"):
        # in the environment: a command line is for all to see
        environment["MLFLOW_BACKEND_STORE_URI"] = uri
        parts.start("mlflow", "mlflow", "server", "--host", HOST, "--port", str(ports["mlflow"]), "--workers", "1")
        parts.await_answer("mlflow", lambda: answers(f"{environment['RLHF_MLFLOW_PAGES']}/health"))
    api = environment["PREFECT_API_URL"]
    parts.await_answer("prefect", lambda: answers(f"{api}/health"))
    _do(root, environment, "prefect", "work-pool", "create", pool, "--type", "process", "--overwrite")
    _do(root, environment, "prefect", "--no-prompt", "deploy", "--all")
    _do(root, environment, "python", "-m", "tasks.notice")
    parts.await_answer("prefect", lambda: forget_other_places(root, api))
    parts.await_answer("prefect", lambda: end_dead_runs(api))
    parts.start("worker", "prefect", "worker", "start", "--pool", pool)


def choose_port(part: str, port: int | None, to_the_end: ExitStack, usual: int = 0) -> int:
    """A port for a part: the one that is given, else the usual one, else any that is free.

    Two that start at the same time do not choose the same one: a name that the system knows is taken until `to_the_end`.

    Raises:
        UserError: the one that is given is taken.
    """
    for candidate in (port,) if port else (USUAL_PORTS.get(part, usual), *[0] * 20):
        with socket.socket() as listener, suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, candidate))
            found = listener.getsockname()[1]
            name = socket.socket(socket.AF_UNIX)
            to_the_end.callback(name.close)
            name.bind(f"\0rlhf-port-{found}")
            return found
    raise UserError(
        f"--{f'{part}-port' if part in USUAL_PORTS else 'port'} {port}: the port is taken",
        remedy="give another one, or none to have a free one chosen",
    )


def forget_other_places(root: Path, api: str) -> bool:
    """Delete deployments that a workspace brought along as it was moved or copied: they lead to where it was before. False: no answer.

    In a home that the user names, they may be other workspaces'.
    """
    if served.home(root) != str(root / "runs" / "prefect"):
        return True
    try:
        for found in _ask(f"{api}/deployments/filter", {}):
            pool = found["work_pool_name"]
            if pool != served.name(root) and found["name"] == f"nightly-{pool}":
                _ask(f"{api}/deployments/{found['id']}", method="DELETE")
    except OSError:
        return False
    return True


def _environment(root: Path, api: str, pages: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": served.home(root),
        "PREFECT_API_URL": api,
        "RLHF_ROOT": str(root),
        "RLHF_WORKSPACE": served.name(root),
        "RLHF_MLFLOW_PAGES": pages,
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # its judges' eight processes would be left where the server is killed, and nothing here asks for them
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # who is running survives a restart of the server: in its memory, a run that it forgot would keep the one place for ever
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


class Parts:
    """The servers and the worker, each a process with a log of its own, all in one process group."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        """Make the folder of logs.

        Args:
            environment: of the parts; what is added to it later is for those that start later.
        """
        self.logs = root / "runs" / "serve"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.group = 0
        self._root, self.environment = root, environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[str, ...]] = {}
        self._ends: dict[str, deque[float]] = {}

    def start(self, name: str, *words: str) -> None:
        self._commands[name] = words
        with (self.logs / f"{name}.log").open("ab") as log:
            program = str(Path(sys.executable).with_name(words[0]))
            self._running[name] = subprocess.Popen(
                [program, *words[1:]],
                cwd=self._root,
                env=self.environment,
                process_group=self.group,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ended(self) -> list[str]:
        return [name for name, process in self._running.items() if process.poll() is not None]

    def start_again(self, name: str, say: Callable[[str], Any]) -> None:
        """Start a part that has ended.

        Raises:
            UserError: it has ended too often for that.
        """
        ends = self._ends.setdefault(name, deque(maxlen=MOST_ENDS))
        ends.append(time.monotonic())
        if len(ends) == MOST_ENDS and ends[-1] - ends[0] < WITHIN_SECONDS:
            self._check()
        say(f"{name} ended with exit code {self._running[name].returncode} and is started again; see {self.logs / name}.log")
        self.start(name, *self._commands[name])

    def await_answer(self, name: str, asked: Callable[[], bool]) -> None:
        """Wait until a part answers what it is `asked`.

        Raises:
            UserError: it does not, or one has ended.
        """
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline:
            self._check()
            if asked():
                return
            time.sleep(0.5)
        raise UserError(f"{name} did not answer within {SECONDS_TO_START} seconds", remedy=f"see {self.logs / name}.log")

    def wait(self) -> None:
        for process in self._running.values():
            process.wait()

    def _check(self) -> None:
        for name in self.ended():
            what = f"{name} ended with exit code {self._running[name].returncode}"
            raise UserError(what, remedy=f"see {self.logs / name}.log")


def answers(address: str) -> bool:
    """Whether a server answers there, and with success."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (OSError, HTTPException):
        return False


def end_dead_runs(api: str) -> bool:
    """Tell Prefect of runs that ended with their worker, while there is none: they would hold the one place. False: it does not answer."""
    alive = _runs_with_a_process()
    time.sleep(SECONDS_TO_EXEC)
    alive |= _runs_with_a_process()
    try:
        under_way = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING", "PAUSED"]}}}
        for run in _ask(f"{api}/flow_runs/filter", {"flow_runs": under_way}):
            # without a deployment, no worker runs it
            if run["deployment_id"] and run["id"] not in alive:
                state = {"type": "CRASHED", "message": "it ended with its worker; a new run goes on from the last checkpoint"}
                _ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state})
    except OSError:
        return False
    return True


def _runs_with_a_process() -> set[str | None]:
    """Flow runs of which a process is found; one that is just being started has no command line yet."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "prefect.engine" in process.cmdline():  # what it has started knows the id as well
                found.add(process.environ().get("PREFECT__FLOW_RUN_ID"))
    return found


def _ask(address: str, content: Any = None, method: str = "POST") -> Any:
    """Prefect's answer; None where what is asked for is there no more.

    Raises:
        OSError: it does not answer, or could do nothing now, as its database was locked (503): it is to be asked again.
        UserError: it refuses.
    """
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.NOT_FOUND:
            return None
        if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        raise UserError(f"Prefect's server refuses {method} {address}: {error}", remedy="see runs/serve/prefect.log") from None
    except (HTTPException, ValueError) as error:  # an answer that was cut off
        raise ConnectionError(str(error)) from None


def _do(root: Path, environment: Mapping[str, str], *words: str) -> None:
    program = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run(
        [program, *words[1:]], cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        what = " ".join((done.stderr or done.stdout).split())[-600:]
        raise UserError(f"`{' '.join(words)}` failed: {what}", remedy="correct prefect.yaml, or what it names")
