"""MLflow runs of the stages, in databases of their own."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from rlhf import config, tracking
from rlhf.launcher.processes import Stopped
from rlhf.tracking import machine, runs
from rlhf.tracking.sending import charted
from rlhf.workspace.fingerprint import Node

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMS = config.load(REPOSITORY / "params.yaml")
PLOTS = {"plots/sft.csv": {"x": "step", "y": "loss"}}
NODE = Node("sft", (), ("models/sft",), ("metrics/sft.json",), PLOTS, "supervised fine-tuning")
MOMENTS = count(1_700_000_000_000)
AWAY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def root(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    # a busy machine must not make these tests fail
    monkeypatch.setattr(runs, "SECONDS_AT_THE_END", 60)
    (tmp_path / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    return tmp_path


@pytest.fixture
def tracked(root: Path) -> Callable[..., Path]:
    """Track a run of sft that logs these steps; its folder."""

    def tracked(fingerprint: str, *steps: int, error: BaseException | None = None) -> Path:
        folder = root / "runs" / "sft" / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        tracker = tracking.of_stage(root, PARAMS, NODE, fingerprint, folder)
        tracker.__enter__()
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(line(step) + "\n" for step in steps)
        tracker.__exit__(type(error) if error else None, error, None)
        return folder

    return tracked


def line(step: int) -> str:
    return json.dumps({"step": step, "total": 9, "at": next(MOMENTS), "metrics": {"loss": 1 / step, "lr": 0.1}})


def history(root: Path, run: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in tracking.client(root, PARAMS).get_metric_history(run, name))


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tracking.json").read_text())


def test_a_run_that_went_on_from_a_checkpoint_has_each_step_once(root: Path, tracked: Callable[..., Path]) -> None:
    folder = tracked("resumed", 1, 2, 3, error=Stopped(15))
    first = state(folder)["run"]
    assert tracking.client(root, PARAMS).get_run(first).info.status == "KILLED"
    tracked("resumed", 2, 3, 4)
    assert state(folder)["run"] == first
    assert history(root, first, "curves/loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert tracking.client(root, PARAMS).get_run(first).info.status == "FINISHED"


def test_a_run_says_what_it_was(root: Path, tracked: Callable[..., Path]) -> None:
    for command in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)
    run = tracking.client(root, PARAMS).get_run(state(tracked("said"))["run"])
    assert run.info.run_name == "sft"
    assert run.data.tags["fingerprint"] == "said"
    # no flow ran it
    assert not {"flow_run_id", "mlflow.parentRunId"} & run.data.tags.keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
    assert run.data.tags["mlflow.source.git.commit"] == head
    assert run.data.tags["mlflow.source.name"] == "rlhf launch sft"
    what = "Stage **sft**, by itself, without a flow: supervised fine-tuning."
    # params.yaml is not in the commit
    assert run.data.tags["mlflow.note.content"] == f"{what}\n\nCode or params differ from commit {head[:8]}."
    # of our own: what code finds it by
    assert {name for name in run.data.tags if not name.startswith("mlflow.")} == {"stage", "fingerprint", "record"}
    assert run.data.params["sft.optimizer.learning_rate"] == str(PARAMS.sft.optimizer.learning_rate)
    assert run.data.params["seed"] == str(PARAMS.seed)


def test_what_went_wrong_comes_first_in_the_description(root: Path, tracked: Callable[..., Path]) -> None:
    run = tracking.client(root, PARAMS).get_run(state(tracked("wrong", 1, error=ValueError("rows\nare missing")))["run"])
    assert run.data.tags["mlflow.note.content"].startswith("**Failed**: rows are missing\n\nStage **sft**")


def test_curves_that_decide_come_first_among_the_charts() -> None:
    sections = {name: charted(name).partition("/")[0] for name in ("kl", "heldout_accuracy", "grad_norm", "pairs_per_second", "system/cpu")}
    assert list(sections.values()) == ["curves", "curves", "details", "speed", "system"]
    # MLflow shows sections by the alphabet
    assert sorted([*sections.values(), "final"])[0] == "curves"


def test_what_waited_for_mlflow_is_sent_whole(
    root: Path, tracked: Callable[..., Path], database: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    results = root / "runs/sft/waited/results"
    for name in ("metrics", "plots"):
        (results / name).mkdir(parents=True)
    (results / "metrics/sft.json").write_text(json.dumps({"rate": {"value": 0.5, "ci95": [0.4, 0.6]}, "note": "text", "gold": None}))
    (results / "plots/sft.csv").write_text("step,loss\n1,0.5\n2,\n3,0.25\n")
    folder = tracked("waited", 1, 2)
    assert "the metrics wait in" in capfd.readouterr().err
    assert tracking.waiting(root) == [folder]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    tracking.send_waiting(root)
    assert tracking.waiting(root) == []
    run = state(folder)["run"]
    assert tracking.run_of("waited", root, PARAMS) == run
    assert history(root, run, "curves/loss") == [(1, 1.0), (2, 0.5)]
    assert [history(root, run, f"final/rate.{name}") for name in ("value", "ci95.0", "ci95.1")] == [[(2, 0.5)], [(2, 0.4)], [(2, 0.6)]]
    artifacts = tracking.client(root, PARAMS).list_artifacts(run, "plots")
    assert {Path(artifact.path).name for artifact in artifacts} == {"sft.csv", "sft.png"}


def test_what_is_sent_twice_is_there_once(root: Path, tracked: Callable[..., Path]) -> None:
    (root / "runs/sft/twice/results/metrics").mkdir(parents=True)
    (root / "runs/sft/twice/results/metrics/sft.json").write_text('{"rate": 0.5}')
    folder = tracked("twice", 1, 2)
    run = state(folder)["run"]
    tracking.send_waiting(root)
    # a kill came after it was sent and before it was noted, and the stage has logged a step anew since
    (folder / "tracking.json").write_text(json.dumps(state(folder) | {"sent": False, "run": None, "steps": {}}))
    tracked("twice", 2)
    assert state(folder)["run"] == run
    assert history(root, run, "curves/loss") == [(1, 1.0), (2, 1 / 2)]
    assert history(root, run, "final/rate") == [(2, 0.5)]
    client = tracking.client(root, PARAMS)
    assert len(client.search_runs([tracking.initialise(root, PARAMS)], "tags.fingerprint = 'twice'")) == 1


def test_the_stages_of_a_flow_are_below_its_run(
    root: Path, tracked: Callable[..., Path], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    monkeypatch.setenv("RLHF_FLOW_RUN_ID", "flow-7")
    with tracking.of_flow(root, PARAMS, "flow-7", "calm-fox", "ada@host, by hand") as flow:
        tracked("first", 1)
        # MLflow is back: the stage is the first to reach it, and the flow's run is opened once all the same
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
        second = tracked("second", 1)
        flow.tag({"decision": "promoted"})
        flow.results.mkdir()
        (flow.results / "report.html").write_text("<p>yes</p>")
    tracking.send_waiting(root)
    client = tracking.client(root, PARAMS)
    own = tracking.run_of_flow("flow-7", root, PARAMS)
    assert own
    run = client.get_run(own)
    assert (run.info.run_name, run.info.status, run.data.tags["decision"]) == ("calm-fox", "FINISHED", "promoted")
    assert run.data.params["ppo.steps"] == str(PARAMS.ppo.steps)
    assert [artifact.path for artifact in client.list_artifacts(own)] == ["report.html"]
    experiment = tracking.initialise(root, PARAMS)
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{own}'")
    assert {found.data.tags["fingerprint"] for found in below} == {"first", "second"}
    assert len(client.search_runs([experiment], "tags.flow_run_id = 'flow-7' and tags.flow = 'retrain'")) == 1
    assert tracking.page(own, root, PARAMS) == f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{own}?workflowType=machine_learning"
    everything = tracking.page(None, root, PARAMS, "http://host:1")
    assert everything == f"http://host:1/#/experiments/{experiment}/runs?workflowType=machine_learning"
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"
    assert (run.data.tags["mlflow.source.name"], run.data.tags["mlflow.user"]) == ("ada@host, by hand", getpass.getuser())
    assert run.data.tags["mlflow.note.content"] == "Retraining, started by ada@host, by hand."

    # what was sent goes as the next flow begins
    with tracking.of_flow(root, PARAMS, "flow-8", "dry-owl", "ada@host, by hand"):
        assert [folder.name for folder in (root / "runs/flow").iterdir()] == ["flow-8"]
    # a stage that goes on under another flow is that one's
    monkeypatch.setenv("RLHF_FLOW_RUN_ID", "flow-8")
    tracked("second", 2)
    moved = client.get_run(state(second)["run"])
    assert moved.data.tags["mlflow.parentRunId"] == tracking.run_of_flow("flow-8", root, PARAMS)


def test_a_run_knows_its_data_and_the_load_of_the_machine(
    root: Path, tracked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SECONDS_BETWEEN_SAMPLES", 0.01)
    raw, prepared = root / "data/raw/mine", root / "data/prepared"
    for folder in (raw, prepared):
        folder.mkdir(parents=True)
    (raw / "part.jsonl.dvc").write_text("outs: [{md5: 0123456789abcdef0123456789abcdef, size: 9, path: part.jsonl}]\n")
    (prepared / "sft.jsonl").write_text("{}\n{}\n")
    (prepared / "heldout_text.jsonl").write_text("{}\n")
    inputs = ("models/base", "data/raw", "data/prepared/sft.jsonl", "data/prepared/heldout_text.jsonl")
    monkeypatch.setitem(globals(), "NODE", replace(NODE, inputs=inputs))

    def sample(fingerprint: str) -> list[int]:
        folder = root / "runs/sft" / fingerprint
        before = len((folder / "system.jsonl").read_text().splitlines()) if folder.exists() else 0
        folder.mkdir(parents=True, exist_ok=True)
        with tracking.of_stage(root, PARAMS, NODE, fingerprint, folder):
            while not (folder / "system.jsonl").exists() or len((folder / "system.jsonl").read_text().splitlines()) < before + 2:
                time.sleep(0.01)
        return [step for step, _ in history(root, state(folder)["run"], "system/cpu_utilization_percentage")]

    first = sample("loaded")
    assert first == list(range(1, len(first) + 1))
    again = sample("loaded")
    assert again == list(range(1, len(again) + 1))
    assert len(again) > len(first)
    run = tracking.client(root, PARAMS).get_run(state(root / "runs/sft/loaded")["run"])
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert run.inputs
    found = {entry.dataset.name: entry for entry in run.inputs.dataset_inputs}
    assert {name: entry.dataset.digest for name, entry in found.items()} == {
        "data/raw/mine/part.jsonl": "0123456789abcdef0123456789abcdef",
        "data/prepared/sft.jsonl": hashlib.md5(b"{}\n{}\n").hexdigest(),
        "data/prepared/heldout_text.jsonl": hashlib.md5(b"{}\n").hexdigest(),
    }
    assert json.loads(str(found["data/prepared/sft.jsonl"].dataset.profile)) == {"lines": 2, "bytes": 6}
    assert [tag.value for tag in found["data/prepared/heldout_text.jsonl"].tags] == ["evaluation"]


def test_a_run_whose_launcher_was_killed_is_ended(root: Path, tracked: Callable[..., Path]) -> None:
    folder = tracked("orphan", 1)
    run = state(folder)["run"]
    tracking.client(root, PARAMS).update_run(run, status="RUNNING")
    (folder / "tracking.json").write_text(json.dumps(state(folder) | {"sent": False, "status": "RUNNING", "ended": None}))
    tracking.send_waiting(root)
    assert tracking.client(root, PARAMS).get_run(run).info.status == "KILLED"


def test_a_run_under_way_is_left_alone(root: Path) -> None:
    folder = root / "runs/sft/live"
    folder.mkdir(parents=True)
    with tracking.of_stage(root, PARAMS, NODE, "live", folder):
        tracking.send_waiting(root)
        assert state(folder)["status"] == "RUNNING"


def test_a_line_under_way_waits_for_its_end(root: Path, tracked: Callable[..., Path]) -> None:
    folder = tracked("partial", 1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "total": 9, "metr')
    tracked("partial")
    assert history(root, state(folder)["run"], "curves/loss") == [(1, 1.0)]


def test_a_run_that_mlflow_has_lost_is_sent_anew(root: Path, tracked: Callable[..., Path]) -> None:
    folder = tracked("lost", 1)
    first = state(folder)["run"]
    tracking.client(root, PARAMS).delete_run(first)
    tracked("lost", 2)
    assert state(folder)["run"] != first
    assert history(root, state(folder)["run"], "curves/loss") == [(1, 1.0), (2, 0.5)]


def test_run_of_finds_the_latest_finished_run(root: Path, tracked: Callable[..., Path]) -> None:
    assert tracking.run_of("wanted", root, PARAMS) is None
    folder = tracked("wanted", 1, error=ValueError())
    assert tracking.run_of("wanted", root, PARAMS) is None
    tracked("wanted", 2)
    assert tracking.run_of("wanted", root, PARAMS) == state(folder)["run"]


def test_two_that_initialise_side_by_side_agree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    # what a launcher left that was killed as it created the database
    (root / "mlruns").mkdir()
    (root / "mlruns/mlflow.new").write_text("half a database")
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(tracking.initialise, root, PARAMS) for _ in range(2)]
    assert both[0].result() == both[1].result()
    assert (root / "mlruns/mlflow.db").exists()
    experiment = tracking.client(root, PARAMS).get_experiment(both[0].result())
    assert experiment.artifact_location.endswith("mlruns/artifacts")


# ends itself in the middle of making the database
ENDS_HALF_WAY = """
import os, threading
from pathlib import Path
from rlhf import config, tracking

root = Path.cwd()

def end():
    while not any(path.stat().st_size for path in root.glob("mlruns/mlflow.*")):
        pass
    os._exit(9)

threading.Thread(target=end).start()
tracking.initialise(root, config.load())
"""


def test_a_launcher_that_ends_half_way_leaves_no_half_database(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (root / "mlruns").mkdir()
    assert (
        subprocess.run(
            [sys.executable, "-c", ENDS_HALF_WAY], cwd=root, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False
        ).returncode
        == 9
    )
    assert not (root / "mlruns/mlflow.db").exists()
    experiment = tracking.initialise(root, PARAMS)
    assert tracking.client(root, PARAMS).get_experiment(experiment).name == PARAMS.tracking.experiment
