"""The stages of the flow: their order, what is told of them, failures and further tries."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.retrain import run_stages
from rlhf import config
from rlhf.errors import UserError
from tasks import progress, stage
from tests.flows.workspaces import PROJECT, artifacts, pipeline, walk


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[stage.Progress]:
    """What happens to stages, as it happens."""
    seen: list[stage.Progress] = []
    monkeypatch.setattr(stage, "_watchers", [seen.append])
    return seen


def test_branches_run_side_by_side_and_a_second_run_has_nothing_to_do(root: Path, told: list[stage.Progress]) -> None:
    def meeting(own: str, other: str) -> dict[str, Any]:
        # each waits for the other: one after the other, the first would give up
        wait = f"for i in $(seq 200); do [ -e {other}.here ] && break; sleep 0.1; done"
        command = f"touch {own}.here; {wait}; [ -e {other}.here ] && cp start {own}"
        return {"cmd": command, "deps": ["start"], "outs": [own]}

    pipeline(
        root,
        {
            "prepare": {"cmd": "echo $RLHF_FLOW_RUN_ID > flow.txt; echo data > start", "outs": ["start"]},
            "sft": meeting("left", "right"),
            "reward": meeting("right", "left"),
            "ppo": {"cmd": "echo 'ppo 3/9 reward=0.5 kl=2'; cat left right > joined", "deps": ["left", "right"], "outs": ["joined"]},
        },
    )
    assert walk(root) == dict.fromkeys(("prepare", "sft", "reward", "ppo"), "done")
    assert (root / "joined").read_text() == "data\ndata\n"
    assert len((root / "flow.txt").read_text().strip()) == 36
    assert stage.Progress("ppo", "running", "reward=0.5 kl=2", 3, 9) in told
    assert [event.state for event in told if event.stage == "ppo"][-1] == "done"

    (root / "left.here").unlink()
    assert set(walk(root).values()) == {"up to date"}
    assert not (root / "left.here").exists()


def test_what_is_wrong_is_told_before_anything_runs_and_not_looked_for_where_nothing_runs(root: Path) -> None:
    pipeline(root, {"prepare": {"cmd": "touch ran; touch start", "outs": ["start"]}})
    shipped = config.load(PROJECT / "params.yaml")
    shared = shipped.model_copy(update={"launch": shipped.launch.model_copy(update={"hostfile": "hosts", "precision": "bf16"})})

    @flow
    def ask() -> dict[str, str]:
        return run_stages(root, shared)

    with pytest.raises(UserError, match=r"launch\.hostfile .*hosts: no such file"):
        ask()
    assert not (root / "ran").exists()
    assert walk(root) == {"prepare": "done"}
    assert ask() == {"prepare": "up to date"}


def test_a_failed_stage_is_named_with_its_reason_and_nothing_after_it_runs(root: Path) -> None:
    mistake = "echo x >> tries; echo 'error: row 7: no prompt' >&2; echo '  remedy: give one' >&2; exit 1"
    pipeline(
        root,
        {
            "prepare": {"cmd": mistake, "outs": ["start"], "meta": {"retries": 2}},
            "sft": {"cmd": "touch ran; touch out", "deps": ["start"], "outs": ["out"]},
        },
    )
    with pytest.raises(UserError) as caught:
        walk(root)
    assert caught.value.what.startswith("stage prepare failed with exit code ")
    assert caught.value.what.endswith("error: row 7: no prompt |   remedy: give one")
    assert "sft" not in caught.value.what
    assert not (root / "ran").exists()
    # what the user has to mend is not tried again
    assert (root / "tries").read_text() == "x\n"


LAUNCH = "import pathlib, sys; from rlhf.launcher.launch import launch; sys.exit(launch('prepare', pathlib.Path(), 'toys'))"
TOY = """
import os, signal
from rlhf.job import run

def main(job):
    tries = job.root / "tries"
    tries.open("a").write("x")
    if len(tries.read_text()) == 1:
        {mishap}
    job.output("out").write_text("ok")

run("prepare", main)
"""


@pytest.mark.parametrize(
    ("mishap", "tries"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 2),
        ("os.kill(os.getppid(), signal.SIGKILL)", 2),
        ("raise ConnectionResetError('Connection reset by peer')", 2),
        ("raise ValueError('row 7')", 1),
        ("os._exit(9)", 1),
    ],
    ids=["killed", "launcher killed", "lost connection", "exception", "exit code"],
)
def test_a_stage_is_tried_again_where_that_may_help(root: Path, monkeypatch: pytest.MonkeyPatch, mishap: str, tries: int) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}:{root}")
    (root / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    (root / "toys").mkdir()
    (root / "toys/prepare.py").write_text(TOY.format(mishap=mishap))
    pipeline(root, {"prepare": {"cmd": f'{sys.executable} -c "{LAUNCH}"', "outs": ["out"], "meta": {"retries": 2}}})
    if tries > 1:
        assert walk(root) == {"prepare": "done"}
    else:
        with pytest.raises(UserError, match="stage prepare failed with exit code"):
            walk(root)
    assert len((root / "tries").read_text()) == tries


def test_stopped_stages_leave_no_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(event: stage.Progress) -> None:
        if event.text == "started":
            stage.stop_all()

    monkeypatch.setattr(stage, "_watchers", [stop])
    pipeline(root, {"base": {"cmd": "echo $$ > pid; echo started; sleep 300; touch out", "outs": ["out"], "meta": {"retries": 3}}})
    with pytest.raises(UserError, match="stage base was stopped"):
        walk(root)
    shell = Path("/proc") / (root / "pid").read_text().strip() / "stat"
    assert not shell.exists() or shell.read_text().split()[2] == "Z"


def test_a_stages_progress_moves_while_it_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_MOVES", 0.1)
    half_way = "echo 'moving 2/8 loss=2.5'; while [ ! -e go ]; do sleep 0.1; done; echo done > out"
    pipeline(root, {"moving": {"cmd": half_way, "outs": ["out"]}})

    def look() -> str:
        try:
            while not (found := artifacts("progress-moving")) or found[-1].data != 25:
                time.sleep(0.1)
            return found[-1].description or ""
        finally:
            (root / "go").touch()

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        walk(root)
        assert looking.result(60) == "moving: loss=2.5"
    assert [(found.data, found.description) for found in artifacts("progress-moving")] == [(100, "moving: done")]
    # of a stage with nothing to do there is one request
    monkeypatch.delattr(progress, "update_progress_artifact")
    walk(root)
    assert [(found.data, found.description) for found in artifacts("progress-moving")] == [
        (100, "moving: done"),
        (100, "moving: up to date"),
    ]
