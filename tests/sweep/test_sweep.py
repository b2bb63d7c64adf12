"""A sweep over a graph of toys: killed and gone on with, each stage run once, DVC's experiments, MLflow's runs, nobody's files changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rlhf import config, tracking
from rlhf.errors import UserError
from rlhf.sweep import sweep as sweeps

REPOSITORY = Path(__file__).parents[2]
PARAMS = config.load(REPOSITORY / "presets/sandbox.yaml")
# what each stage writes follows from what it reads; `began` and `ended` are told to the test, which can hold a stage up
TOY = """
import json, os, pathlib, sys, time
import yaml
stage, home = sys.argv[1], pathlib.Path(os.environ["TOYS"])
params = yaml.safe_load(open("params.yaml"))
def tell(what):
    with open(home / "log", "a") as file:
        file.write(f"{stage} {what}\\n")
def write(path, text):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)
tell("began")
while (home / f"hold-{stage}").exists():
    time.sleep(0.02)
if stage == "prepare":
    write("data/prepared/rows", pathlib.Path("data/raw/rows.txt").read_text())
elif stage == "ppo":
    if params["ppo"]["kl"]["coefficient"] == 0.3:
        sys.exit("error: no luck with 0.3")
    write("models/ppo/weights", f"{params['seed']} {params['ppo']['kl']['coefficient']}")
else:
    kl = 1 / params["ppo"]["kl"]["coefficient"]
    write("metrics/summary.json", json.dumps({"gold": round(kl / (kl + 5), 4), "kl": kl}))
tell("ended")
"""
SPACE = """
name: toys
method: grid
points: 4
values:
  ppo.kl.coefficient: [0.1, 0.2, 0.3]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with changes that are not committed: they are part of the sweep."""
    root = tmp_path_factory.mktemp("sweep") / "workspace"
    (root / "data/raw").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "graphs", root / "graphs")
    shutil.copy(REPOSITORY / "presets/sandbox.yaml", root / "params.yaml")
    (root / "data/raw/rows.txt").write_text("hello")
    (root / "toy.py").write_text(TOY)
    (root / ".gitignore").write_text("/runs\n/mlruns/*\n/models/\n/data/prepared\n")
    stages: dict[str, dict[str, Any]] = {
        "prepare": {"deps": ["data/raw", "toy.py"], "params": ["seed"], "outs": ["data/prepared"]},
        "ppo": {"deps": ["data/prepared/rows"], "params": ["seed", "ppo"], "outs": ["models/ppo"]},
        "evaluate": {"deps": ["models/ppo"], "params": ["evaluate"], "metrics": [{"metrics/summary.json": {"cache": False}}]},
    }
    for name, stage in stages.items():
        stage["cmd"] = [f"{sys.executable} toy.py {name}"]
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for words in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "add", "."], ["git", "commit", "-qm", "first"]):
        call(root, *words)
    (root / "data/raw/rows.txt").write_text("hello again")
    (root / "space.yaml").write_text(SPACE)
    return root


def environment(root: Path) -> dict[str, str]:
    names = {f"GIT_{role}_{part}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_TRACKING", "RLHF_"))}
    packages = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return outside | names | {"PATH": path, "PYTHONPATH": packages, "TOYS": str(root.parent)}


def call(root: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=root, env=environment(root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rlhf.cli", "sweep", "space.yaml", *words]
        process = subprocess.Popen(command, cwd=root, env=environment(root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120  # it only bounds a failure
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def log(root: Path) -> Counter[str]:
    path = root.parent / "log"
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def experiments(root: Path) -> dict[str, str]:
    """The tree of each DVC experiment, by its name."""
    names = call(root, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {name.rpartition("/")[2]: call(root, "git", "rev-parse", f"{name}^{{tree}}").strip() for name in names}


def test_a_sweep_that_is_killed_goes_on_where_it_was(root: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    before = call(root, "git", "status", "--porcelain")
    hold = root.parent / "hold-ppo"
    hold.touch()
    first = start()
    eventually(lambda: log(root)["ppo began"])
    left = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    assert log(root) == {"prepare began": 1, "prepare ended": 1, "ppo began": 1}

    second = start("--jobs", "2")
    eventually(lambda: log(root)["ppo began"] == 3)  # one more, and the one that was killed again
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left)
    hold.unlink()
    said = second.communicate()[0]
    assert second.returncode == 0, said
    assert "toys-3: failed: error: no luck with 0.3" in said
    assert "2 of 3 points done, 1 failed" in said
    assert "`dvc exp apply toys-1` brings the best back" in said
    assert log(root) == {"prepare began": 1, "prepare ended": 1, "ppo began": 4, "ppo ended": 2, "evaluate began": 2, "evaluate ended": 2}
    assert call(root, "git", "status", "--porcelain") == before
    assert not (root / "models").exists()
    (kept,) = (path.name for path in (root / ".dvc/tmp/exps/sweep-toys").iterdir() if path.is_dir())
    assert kept.startswith("3-")  # a further try goes on there
    page = (root / "runs/sweeps/toys/report.html").read_text()
    assert "3 points by grid: 2 done, 1 failed." in page


def test_a_finished_sweep_does_nothing(root: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    known, before = log(root), experiments(root)
    assert list(before) == ["toys-1", "toys-2"]
    again = start()
    assert "nothing to do: every point is finished" in again.communicate()[0]
    assert (log(root), experiments(root)) == (known, before)


def test_points_are_runs_below_that_of_the_sweep_and_nothing_is_registered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow has set it to the workspace of another test
    experiment = tracking.initialise(root, PARAMS)
    client = tracking.client(root, PARAMS)
    runs = {run.info.run_name: run for run in client.search_runs([experiment], "tags.sweep = 'toys'")}
    assert {name: run.info.status for name, run in runs.items()} == {
        "sweep toys": "FINISHED",
        "toys-1": "FINISHED",
        "toys-2": "FINISHED",
        "toys-3": "FAILED",
    }
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs.values()} == {None, runs["sweep toys"].info.run_id}
    assert runs["toys-1"].data.params == {"ppo.kl.coefficient": "0.1"}
    assert runs["toys-1"].data.metrics["final/gold"] == pytest.approx(0.6667)
    assert "no luck with 0.3" in runs["toys-3"].data.tags["mlflow.note.content"]
    assert [file.path for file in client.list_artifacts(runs["sweep toys"].info.run_id)] == ["report.html"]
    assert client.search_model_versions() == []


def test_points_are_experiments_as_dvc_knows_them(root: Path) -> None:
    call(root, "dvc", "exp", "run", "-q", "-S", "ppo.kl.coefficient=0.5", "--name", "mine")
    shown = json.loads(call(root, "dvc", "exp", "show", "--json"))
    found = {one["name"]: one["revs"][0]["data"]["metrics"]["metrics/summary.json"]["data"] for one in shown[1]["experiments"]}
    assert {name: round(numbers["kl"], 2) for name, numbers in found.items() if name in ("mine", "toys-1")} == {"mine": 2, "toys-1": 10}
    call(root, "dvc", "exp", "apply", "-q", "toys-1")
    assert (root / "models/ppo/weights").read_text() == "1 0.1"
    assert (root / "data/raw/rows.txt").read_text() == "hello again"
    assert json.loads((root / "metrics/summary.json").read_text())["kl"] == 10
    assert call(root, "dvc", "status") == "Data and pipelines are up to date.\n"


def test_a_point_that_lacks_an_objective_has_failed(root: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    (root / "space.yaml").write_text("""{name: lacking, method: tpe, points: 1, values: {ppo.kl.coefficient: [0.1, 0.2]},
        objectives: {reward_accuracy: maximize}}""")
    said = start().communicate()[0]
    assert "lacking-1: failed: its numbers could not be kept: metrics/summary.json has no reward_accuracy" in said
    assert "error: every point failed" in said
    assert "lacking-1" not in experiments(root)


def test_an_experiment_of_the_users_own_is_not_replaced(root: Path) -> None:
    head = call(root, "git", "rev-parse", "HEAD").strip()
    call(root, "git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/lr-2", head)
    space = root / "lr.yaml"
    space.write_text(SPACE.replace("toys", "lr"))
    with pytest.raises(UserError, match="an experiment of this commit has the name lr-2, and is not of sweep lr"):
        sweeps.sweep(root, space, 1, print)
    assert call(root, "git", "for-each-ref", "refs/rlhf/sweeps/lr") == ""


def test_it_is_stopped_by_a_command(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    with pytest.raises(UserError, match="sweep toys is not under way"):
        sweeps.cancel(tmp_path, space)
    hold = "import sys, pathlib, time; from rlhf.locks import lock\n"
    hold += "with lock(pathlib.Path(sys.argv[1]), 'sweep-toys'): print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, env=environment(tmp_path))
    assert holder.stdout
    holder.stdout.readline()
    assert "was told to stop" in sweeps.cancel(tmp_path, space)
    assert holder.wait() == -signal.SIGTERM
    holder.stdout.close()
