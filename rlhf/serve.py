"""`rlhf serve`: Prefect's server, a worker for the deployments of prefect.yaml, and MLflow's pages, all on this machine's loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rlhf import config, processes, tracking
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.redact import redact

HOST = "127.0.0.1"
POOL = "rlhf"
SECONDS_TO_START = 600
SECONDS_TO_EXEC = 0.5  # from a process's fork until it has the command line that it is known by
MOST_ENDS, WITHIN_SECONDS = 5, 120  # a part that ends so often in so short a time would end for ever


def serve(root: Path, params: config.Params, prefect_port: int, mlflow_port: int, say: Callable[[str], Any]) -> None:
    """Start all, tell the addresses, and stay until SIGINT or SIGTERM; nothing is left running then.

    Raises:
        UserError: a part did not start, or ended again and again; one that ends now and then, however that is, is started again.
    """
    api, pages = f"http://{HOST}:{prefect_port}/api", f"http://{HOST}:{mlflow_port}"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_API_URL": api,
        "RLHF_ROOT": str(root),
        "RLHF_MLFLOW_PAGES": pages,
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # who is running survives a restart of the server: in its memory, a run that it forgot would keep the one place for ever
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    tracking.initialise(root, params)  # before two processes find no database
    logs = root / "runs" / "serve"
    logs.mkdir(parents=True, exist_ok=True)
    started: dict[str, subprocess.Popen[bytes]] = {}
    commands: dict[str, tuple[str, ...]] = {}
    ends: dict[str, deque[float]] = {}
    with lock(root, "serve", refuse=f"{root} is being served already"), processes.stoppable(), processes.group() as leader:

        def start(name: str, *words: str) -> None:
            commands[name] = words
            with (logs / f"{name}.log").open("ab") as log:
                program = str(Path(sys.executable).with_name(words[0]))
                started[name] = subprocess.Popen(
                    [program, *words[1:]],
                    cwd=root,
                    env=environment,
                    process_group=leader,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

        try:
            start("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port))
            uri = tracking.tracking_uri(root, params)
            if not uri.startswith("http"):
                # in the environment: a command line is for all to see
                environment["MLFLOW_BACKEND_STORE_URI"] = uri
                start("mlflow", "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1")
                _await(f"{pages}/health", "mlflow", started, logs)
            _await(f"{api}/health", "prefect", started, logs)
            _do(root, environment, "prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
            _do(root, environment, "prefect", "--no-prompt", "deploy", "--all")
            end_dead_runs(api)
            start("worker", "prefect", "worker", "start", "--pool", POOL)
            say(f"Prefect   http://{HOST}:{prefect_port}")
            say(f"MLflow    {redact(uri) if uri.startswith('http') else pages}")
            say(f"worker    of pool {POOL}; logs in {logs.relative_to(root)}")
            say(f"to see `rlhf run` and `rlhf ingest` there: export PREFECT_API_URL={api}")
            while True:
                time.sleep(1)
                for name, process in started.items():
                    if process.poll() is not None and (name != "worker" or end_dead_runs(api)):
                        last = ends.setdefault(name, deque(maxlen=MOST_ENDS))
                        last.append(time.monotonic())
                        if len(last) == MOST_ENDS and last[-1] - last[0] < WITHIN_SECONDS:
                            _check(started, logs)
                        say(f"{name} ended with exit code {process.returncode} and is started again; see {logs / name}.log")
                        start(name, *commands[name])
        except processes.Stopped:
            say("stopped")
    for process in started.values():
        process.wait()


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


def _ask(address: str, content: Any) -> Any:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def _await(address: str, name: str, started: Mapping[str, subprocess.Popen[bytes]], logs: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        _check(started, logs)
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    raise UserError(f"{name} did not answer within {SECONDS_TO_START} seconds", remedy=f"see {logs / name}.log")


def _check(started: Mapping[str, subprocess.Popen[bytes]], logs: Path) -> None:
    for name, process in started.items():
        if (code := process.poll()) is not None:
            raise UserError(f"{name} ended with exit code {code}", remedy=f"see {logs / name}.log; is the port taken? (--help)")


def _do(root: Path, environment: Mapping[str, str], *words: str) -> None:
    program = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run(
        [program, *words[1:]], cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        what = " ".join((done.stderr or done.stdout).split())[-600:]
        raise UserError(f"`{' '.join(words)}` failed: {what}", remedy="correct prefect.yaml")
