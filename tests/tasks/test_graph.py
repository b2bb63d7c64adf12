"""Reading the DVC graph of real, tiny workspaces."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dvc.progress import Tqdm
from dvc_data.callbacks import TqdmCallback

from rlhf.errors import UserError
from tasks import graph

DVC = str(Path(sys.executable).with_name("dvc"))
PIPELINE = """\
stages:
  join:
    cmd: cat left.txt right.txt > joined.txt
    deps: [left.txt, right.txt]
    outs: [joined.txt]
  right:
    cmd: cp raw.txt right.txt
    deps: [raw.txt]
    outs: [right.txt]
  left:
    desc: the left half
    cmd: head -c 1 raw.txt > left.txt
    deps: [raw.txt]
    outs: [left.txt]
    meta: {gpus: 1, retries: 2}
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subprocess.run([DVC, "init", "--quiet"], cwd=tmp_path, check=True)
    (tmp_path / "raw.txt").write_text("ab")
    subprocess.run([DVC, "add", "--quiet", "raw.txt"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    return tmp_path


def test_stages_come_after_what_they_depend_on(workspace: Path) -> None:
    stages = {stage.name: stage for stage in graph.read(workspace)}
    names = list(stages)
    assert names[0] == "raw.txt.dvc"
    assert names[-1] == "join"
    assert stages["join"].after == ("left", "right")
    assert stages["raw.txt.dvc"].is_data
    left = stages["left"]
    assert (left.description, left.gpus, left.retries, left.after, left.is_data) == ("the left half", 1, 2, ("raw.txt.dvc",), False)
    assert (stages["right"].gpus, stages["right"].retries) == (0, 0)


def test_a_stage_is_current_only_if_all_before_it_are(workspace: Path) -> None:
    def current() -> set[str]:
        return {stage.name for stage in graph.read(workspace) if stage.current}

    assert current() == {"raw.txt.dvc"}
    subprocess.run([DVC, "repro", "--quiet"], cwd=workspace, check=True)
    assert current() == {"raw.txt.dvc", "left", "right", "join"}
    # the inputs of `join` are as they were; but they will not stay so
    (workspace / "raw.txt").write_text("cd")
    assert current() == set()
    (workspace / "raw.txt").write_text("ab")
    (workspace / "dvc.yaml").write_text(PIPELINE.replace("cp raw.txt right.txt", "cat raw.txt > right.txt"))
    assert current() == {"raw.txt.dvc", "left"}


def test_no_dvc_repository(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc init"):
        graph.read(tmp_path)


def test_a_wrong_graph_is_named_with_what_is_wrong(workspace: Path) -> None:
    graph.check(workspace)
    (workspace / "dvc.yaml").write_text("stages:\n  join: {cmmd: 'true', cmd: 'true'}\n")
    for read in (graph.read, graph.check):
        with pytest.raises(UserError, match=r"dvc\.yaml.*validation failed: extra keys not allowed.*'join'.*'cmmd'"):
            read(workspace)


def test_no_bars_of_dvc_stand_between_ours() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for make in (Tqdm, TqdmCallback):
        terminal = Terminal()
        bar = make(total=3, desc="Checking graph", file=terminal) if make is Tqdm else make(size=3, desc="Checking", file=terminal)
        bar.close()
        assert terminal.getvalue() == ""


def test_a_stage_that_is_being_run_is_told_of(workspace: Path) -> None:
    (workspace / "dvc.yaml").write_text("stages:\n  slow:\n    cmd: touch here; sleep 300\n    deps: [raw.txt]\n    outs: [out]\n")
    with subprocess.Popen([DVC, "repro", "--quiet"], cwd=workspace, start_new_session=True) as run:
        while not (workspace / "here").exists():
            time.sleep(0.1)
        try:
            with pytest.raises(graph.BusyError, match="a stage is being run there just now"):
                graph.read(workspace)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
