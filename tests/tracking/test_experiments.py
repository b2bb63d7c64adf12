"""DVC runs queued and temporary experiments in folders that it deletes: their MLflow runs are the workspace's all the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.retrain import check
from rlhf import config, registry, tracking
from rlhf.errors import UserError
from rlhf.launcher.console import Console
from rlhf.workspace.find import EXPERIMENTS, home, is_deleted
from rlhf.workspace.fingerprint import Node
from tests.launcher.test_launch import REPOSITORY, UNDER_WAY, write_stages

PARAMS = config.load(REPOSITORY / "params.yaml")
AWAY = "http://127.0.0.1:9"
LAUNCH = "from pathlib import Path; from rlhf.launcher.launch import launch; raise SystemExit(launch('prepare', Path.cwd(), 'toys'))"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "workspace"
    for folder in ("data/raw", "toys"):
        (root / folder).mkdir(parents=True)
    shutil.copy(REPOSITORY / "params.yaml", root)
    (root / "data/raw/rows.txt").write_text("hello")
    write_stages(root)
    (root / ".gitignore").write_text("runs\n/mlruns\n__pycache__\n")
    stage = {
        "cmd": f'{sys.executable} -c "{LAUNCH}"',
        "deps": ["data/raw", "toys/prepare.py"],
        "params": ["seed"],
        "outs": ["data/prepared"],
        "metrics": [{"metrics/prepare.json": {"cache": False}}],
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"prepare": stage}}))
    for words in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "add", "."], ["git", "commit", "-qm", "first"]):
        call(root, *words)
    return root


def call(root: Path, *words: str, **environment: str) -> str:
    done = subprocess.run(words, cwd=root, env=own_environment() | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def own_environment() -> dict[str, str]:
    names = {f"GIT_{role}_{part}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | names | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def runs(root: Path) -> list[dict[str, str]]:
    experiment = tracking.initialise(root, PARAMS)
    return [run.data.tags for run in tracking.client(root, PARAMS).search_runs([experiment])]


def test_runs_of_queued_experiments_are_the_workspaces(workspace: Path) -> None:
    call(workspace, "dvc", "exp", "run", "--queue", "--name", "later", "-S", "seed=4")
    call(workspace, "dvc", "queue", "start")
    call(workspace, "dvc", "queue", "logs", "later", "--follow")
    tracking.send_waiting(workspace)  # on a busy machine MLflow takes longer than a stage waits for it
    assert [(tags["stage"], tags["dvc.experiment"]) for tags in runs(workspace)] == [("prepare", "later")]
    assert list((workspace / ".dvc/tmp/exps").glob("**/dvc.yaml")) == []


def test_a_queued_experiment_that_is_killed_promises_nothing_of_its_folder(workspace: Path) -> None:
    write_stages(workspace, UNDER_WAY)
    call(workspace, "dvc", "exp", "run", "--queue", "--name", "killed", "-S", "seed=4")
    write_stages(workspace)
    before = (workspace / "params.yaml").read_bytes()
    with (workspace / "worker.txt").open("w") as file:  # the worker, which goes on in the background, holds on to it
        subprocess.run(["dvc", "queue", "start"], cwd=workspace, env=own_environment(), stdout=file, stderr=file, check=True)
    wait_until(lambda: bool(list((workspace / EXPERIMENTS).glob("*/runs/prepare/*/pids"))))
    call(workspace, "dvc", "queue", "kill", "killed")
    (log,) = (workspace / EXPERIMENTS).glob("run/*/*.out")  # what `dvc queue logs killed` shows
    wait_until(lambda: "; DVC deletes its folder: queued again, it begins anew" in log.read_text())
    assert (workspace / "params.yaml").read_bytes() == before


def test_a_stage_that_fails_there_names_no_log_that_is_deleted(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder, said in (("runs", "exit code 3; its log: "), (EXPERIMENTS / "tmp1", "exit code 3; DVC deletes its log")):
        (workspace / folder).mkdir(parents=True)
        with Console("prepare", workspace / folder / "log.txt") as console:
            console.explain(3)
        assert said in capfd.readouterr().err


def test_a_run_whose_folder_is_deleted_says_so_once(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = workspace / EXPERIMENTS / "tmp1"
    (root / ".dvc").mkdir(parents=True)
    folder = root / "runs/prepare/f00d"
    folder.mkdir(parents=True)
    with tracking.of_stage(root, PARAMS, Node("prepare", (), (), (), {}, ""), "f00d", folder):
        shutil.rmtree(folder)
    said = capfd.readouterr().err
    assert said.count("tmp1/runs/prepare/f00d was deleted: what was logged last is lost") == 1
    assert "metrics wait" not in said
    assert tracking.waiting(workspace) == []


def test_what_mlflow_could_not_take_waits_in_the_workspace(workspace: Path) -> None:
    call(workspace, "dvc", "exp", "run", "--temp", "--name", "apart", "-S", "seed=3", MLFLOW_TRACKING_URI=AWAY)
    (kept,) = tracking.waiting(workspace)
    assert (kept / "results/metrics/prepare.json").is_file()
    tracking.send_waiting(workspace)
    assert [tags["dvc.experiment"] for tags in runs(workspace)] == ["apart"]
    assert json.loads((kept / "tracking.json").read_text())["sent"]


@pytest.mark.parametrize("place", ["tmp1", "standalone/tmp1", "tmp1/part/of/repository"])
def test_nothing_is_registered_from_such_a_folder(workspace: Path, place: str) -> None:
    root = workspace / ".dvc/tmp/exps" / place
    (root / ".dvc").mkdir(parents=True)
    assert home(root) == workspace
    assert home(root / "below") == workspace / "below"
    assert home(workspace) == workspace
    assert is_deleted(root)
    assert not is_deleted(workspace)
    assert not is_deleted(workspace / EXPERIMENTS / "sweep-ppo/1")  # until its point is finished
    for register in (lambda: registry.register(root, PARAMS), lambda: check(root)):
        with pytest.raises(UserError, match=r"the temporary folder of a DVC experiment.*in .*workspace: `dvc exp apply NAME`"):
            register()
