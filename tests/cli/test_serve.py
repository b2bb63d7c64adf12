"""`rlhf serve` in two workspaces side by side, with runs in both: nothing crosses over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from rlhf.cli import serve
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.workspace import served
from tests.flows.workspaces import whole_pipeline

PROJECT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
SECONDS = 400  # they only bound a failing test


class Workspace:
    """A workspace with a small pipeline, as a user has it who has set nothing."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root, self.log = root, root.with_suffix(".log")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "RLHF_"))}
        self.environment = kept | {"HOME": str(home), "PYTHONPATH": str(PROJECT), "DO_NOT_TRACK": "true"}
        root.mkdir(parents=True)
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
        subprocess.run([PROGRAMS / "dvc", "init", "--quiet"], cwd=root, env=self.environment, check=True)
        whole_pipeline(root)
        shutil.copytree(PROJECT / "flows", root / "flows")
        shutil.copy(PROJECT / "prefect.yaml", root)

    def change(self, before: str, after: str) -> None:
        params = (self.root / "params.yaml").read_text()
        assert before in params
        (self.root / "params.yaml").write_text(params.replace(before, after))

    def serve(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen([PROGRAMS / "rlhf", "serve"], cwd=self.root, env=self.environment, stdout=log, stderr=log)

    def ask(self, path: str, content: Any = None) -> Any:
        """Prefect's answer, once it has one: 503 says that its SQLite was locked and nothing was done, and that is asked again."""
        body = None if content is None else json.dumps(content).encode()
        servers = served.find(self.root)
        assert servers
        request = urllib.request.Request(f"{servers.api}/{path}", body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def runs(self) -> list[Any]:
        """Flow runs that have begun; the others are of nights to come."""
        return [run for run in self.ask("flow_runs/filter", {}) if run["start_time"]]

    def await_runs(self, count: int) -> list[str]:
        """The states of so many runs, once they are over."""
        deadline = time.monotonic() + SECONDS
        while len(over := [run for run in self.runs() if run["end_time"]]) < count:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)
        return [run["state_type"] for run in over]


class Receiver(BaseHTTPRequestHandler):
    """Takes notices."""

    notices: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json"
        self.notices.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def receiving() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def await_notices(count: int) -> list[tuple[str, dict[str, Any]]]:
    deadline = time.monotonic() + SECONDS
    while len(Receiver.notices) < count:
        assert time.monotonic() < deadline, Receiver.notices
        time.sleep(0.2)
    return Receiver.notices


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Workspace]]:
    """Two workspaces of one user, in folders of the same name, both served."""
    place = tmp_path_factory.mktemp("two")
    (place / "home").mkdir()
    first, second = (Workspace(place / name / "work", place / "home") for name in ("one", "other"))
    with ExitStack() as to_the_end:
        # both are to be told of: one by params.yaml, the other, whose gates refuse, by the environment
        receiver = to_the_end.enter_context(receiving())
        first.change("notify:\n", f"notify: {receiver}/one\n")
        second.environment["RLHF_NOTIFY_URL"] = f"{receiver}/other"
        second.change("min_reward_accuracy: 0.85", "min_reward_accuracy: 0.95")
        for workspace in (first, second):
            process = workspace.serve()
            to_the_end.callback(process.wait)
            to_the_end.callback(process.send_signal, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        for workspace in (first, second):
            while "worker    of pool" not in workspace.log.read_text():
                assert time.monotonic() < deadline, workspace.log.read_text()
                time.sleep(0.2)
        yield first, second


def test_a_run_in_each_of_two_served_workspaces(two: tuple[Workspace, Workspace]) -> None:
    first, second = two
    (one,), (other,) = (workspace.ask("deployments/filter", {}) for workspace in two)
    assert (one["name"], other["name"]) == (served.deployment(first.root), served.deployment(second.root))
    assert one["name"] != other["name"]
    assert one["name"].startswith("nightly-work-")

    second.ask(f"deployments/{other['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    # beside the first one's servers, which it finds
    run = subprocess.run([PROGRAMS / "rlhf", "run"], cwd=first.root, env=first.environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "version 1 is champion, the one before is none" in run.stdout
    assert first.await_runs(1) == second.await_runs(1) == ["COMPLETED"]
    assert [run["deployment_id"] for run in first.runs() + second.runs()] == [None, other["id"]]
    assert all((workspace.root / "dvc.lock").exists() and (workspace.root / "mlruns/mlflow.db").exists() for workspace in two)
    assert not (first.root.parents[1] / "home" / ".prefect").exists()
    # MLflow's judges, which nobody here asks, would be eight processes of each server
    started = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert any("mlflow" in command for command in started)
    assert not any("huey" in command for command in started)


def test_who_is_to_be_told_is_told_of_refused_failed_and_crashed_runs(two: tuple[Workspace, Workspace]) -> None:
    second = two[1]
    path, notice = await_notices(1)[0]
    assert path == "/other"
    assert (notice["workspace"], notice["state"]) == (served.name(second.root), "refused")
    assert "min_reward_accuracy: reward model's accuracy: 0.9, short of 0.95 by 0.05" in notice["message"]
    assert notice["text"].startswith(f"{notice['workspace']}: run {notice['run']} is refused: version 1 is candidate, champion is none; ")
    assert notice["page"].startswith("http://127.0.0.1:")

    second.change("algorithm: ppo", "algorithm: none")
    (deployment,) = second.ask("deployments/filter", {})
    second.ask(f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    failed = await_notices(2)[1]
    assert (failed[0], failed[1]["state"]) == ("/other", "Failed")
    assert "algorithm: Input should be 'ppo', 'dpo', " in failed[1]["message"]

    # of another workspace, on a server that several use
    foreign = second.ask("flow_runs/", {"flow_id": deployment["flow_id"], "state": {"type": "PENDING"}})
    second.ask(f"flow_runs/{foreign['id']}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    # as when its worker has ended with it
    run = second.ask(f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "PENDING"}})
    second.ask(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    assert [(path, notice["state"], notice["run"]) for path, notice in await_notices(3)[2:]] == [("/other", "Crashed", run["name"])]


def test_a_copy_does_not_take_the_servers_for_its_own(two: tuple[Workspace, Workspace], tmp_path: Path) -> None:
    root = two[0].root
    shutil.copytree(root / "runs" / "serve", tmp_path / "runs" / "serve")
    assert served.find(root)
    assert served.find(tmp_path) is None
    assert served.name(tmp_path) != served.name(root)
    with lock(tmp_path, served.LOCK), pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "SECONDS_TO_START", 0.2)
        assert served.find(tmp_path) is None


class Scripted(BaseHTTPRequestHandler):
    """Prefect that answers each request with the next of some statuses, and has no runs."""

    statuses: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.statuses.pop(0))
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_prefect_is_asked_again_where_its_database_was_locked_and_not_where_it_refuses(tmp_path: Path) -> None:
    Scripted.statuses[:] = [503, 200, 503, 200, 400]
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = f"http://127.0.0.1:{server.server_address[1]}"
        patch.delenv("PREFECT_HOME", raising=False)
        assert [serve.end_dead_runs(api), serve.end_dead_runs(api)] == [False, True]
        assert [serve.forget_other_places(tmp_path, api), serve.forget_other_places(tmp_path, api)] == [False, True]
        with pytest.raises(UserError, match=r"refuses POST \S+/flow_runs/filter: HTTP Error 400"):
            serve.end_dead_runs(api)
        server.shutdown()


def test_a_port_is_free_or_refused_if_it_was_asked_for() -> None:
    with ExitStack() as stack:
        chosen = {serve.choose_port("prefect", None, stack) for _ in range(3)}
        assert len(chosen) == 3
        with pytest.raises(UserError, match=f"--mlflow-port {(port := chosen.pop())}: the port is taken"):
            serve.choose_port("mlflow", port, stack)


def test_a_server_that_is_gone_is_told_in_one_line(tmp_path: Path) -> None:
    root = Workspace(tmp_path / "work", tmp_path)
    environment = root.environment | {"PREFECT_API_URL": "http://127.0.0.1:1/api"}
    run = subprocess.run([PROGRAMS / "rlhf", "run"], cwd=root.root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout == ""
    _starting, line = run.stderr.splitlines()
    assert line.startswith("error: PREFECT_API_URL is http://127.0.0.1:1/api, where no Prefect server answers")
    assert line.endswith("`unset PREFECT_API_URL`: `rlhf run` then finds or starts one for itself")
