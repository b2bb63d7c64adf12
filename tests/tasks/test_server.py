"""`rlhf run` that is stopped leaves nothing running, above all not the Prefect server that it started for itself."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import psutil

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
MARK = "RLHF_TEST_OF_LEFTOVERS"


def left(mark: str) -> list[psutil.Process]:
    """Every process that descends from the run with this mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def is_server(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "prefect.server.api.server:create_app" in process.cmdline()
    return False


def test_the_server_is_started_before_prefect_is_loaded_here(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from tasks import server

        own = server.start(Path.cwd())
        assert own and "prefect" not in sys.modules
        server.ensure(own)
        from prefect import flow
        from prefect.settings import get_current_settings

        settings = get_current_settings()
        assert str(settings.api.url) == own.address and not server.lasts()
        # at the end of a flow run, its heart is waited for
        assert settings.flows.heartbeat_frequency is None
        assert flow(lambda: "ran", name="empty")() == "ran"
    """
    assert within(tmp_path, program).returncode == 0


def test_a_server_that_a_file_of_prefects_names_is_asked_and_the_own_one_stopped(tmp_path: Path) -> None:
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:1/api"\n')
    program = """
        from pathlib import Path
        from rlhf.errors import UserError
        from tasks import server

        server.SECONDS_TO_COME_BACK = 0
        own = server.start(Path.cwd())
        try:
            server.ensure(own)
        except UserError as error:
            assert "PREFECT_API_URL is http://127.0.0.1:1/api" in error.what
        else:
            raise AssertionError
        assert own and own.process.poll() is not None
    """
    assert within(tmp_path, program).returncode == 0


def within(root: Path, program: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program in a folder, without what the environment says of Prefect."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = kept | {"PREFECT_HOME": str(root / "prefect"), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", dedent(program)], cwd=root, env=environment, check=False)


def test_a_stopped_run_leaves_no_server(tmp_path: Path) -> None:
    root, mark = tmp_path / "workspace", str(tmp_path)
    root.mkdir()
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    (root / "dvc.yaml").write_text("stages:\n  base:\n    cmd: echo $$ > pid; sleep 300\n    outs: [out]\n", encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_", "RLHF_"))}
    environment = kept | {MARK: mark, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    subprocess.run([PROGRAMS / "dvc", "init", "--quiet"], cwd=root, env=environment, check=True)
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen([PROGRAMS / "rlhf", "run"], cwd=root, env=environment, stdout=log, stderr=log)
    try:
        while not (root / "pid").exists():
            assert run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert any(map(is_server, left(mark)))
        run.terminate()
        code = run.wait(30)
        deadline = time.monotonic() + 30
        while any(map(is_server, left(mark))) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_server, left(mark)))
        assert code == 128 + signal.SIGTERM
        assert left(mark) == []
        assert "stopped by SIGTERM; a rerun goes on from the last checkpoint" in (tmp_path / "log").read_text()
    finally:
        for process in left(mark):
            with suppress(psutil.Error):
                process.kill()
