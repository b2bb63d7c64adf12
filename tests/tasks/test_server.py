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
        return "uvicorn" in process.cmdline()
    return False


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
