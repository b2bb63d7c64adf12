"""The launcher, on toy stages that run as real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from rlhf import config
from rlhf.errors import UserError
from rlhf.launcher import command
from rlhf.launcher.launch import check_base, launch
from rlhf.locks import held
from rlhf.workspace import fingerprint

REPOSITORY = Path(__file__).resolve().parents[2]

GRAPH = """
stages:
  prepare:
    deps: [data/raw, toys/prepare.py]
    outs: [data/prepared]
    metrics: [{metrics/prepare.json: {cache: false}}]
  sft:
    deps: [data/prepared, toys/sft.py]
    outs: [models/sft]
    metrics: [{metrics/sft.json: {cache: false}}]
    plots: [{plots/sft.csv: {cache: false, x: step, y: loss}}]
"""

PREPARE = """
import json, os, pathlib, subprocess, sys, time
from rlhf.errors import UserError
from rlhf.job import run

def main(job):
    with (job.root / "runs" / "attempts").open("a") as file:
        file.write("attempt\\n")
    {before}
    job.log(1, 2, {{"rows": 1.0}})
    job.output("data/prepared/rows.txt").write_text(job.input("data/raw/rows.txt").read_text().upper())
    job.write_metrics({{"rows": 1}})

run("prepare", main)
"""

SFT = """
import os, signal, sys, time
from rlhf.job import run

def main(job):
    {before}
    job.say(f"one of {{job.world_size}} with {{os.environ['OMP_NUM_THREADS']}} threads, mlflow {{bool(sys.modules.get('mlflow'))}}")
    (job.folder / f"rank-{{job.rank}}").touch()
    if job.is_main:
        job.output("models/sft/model.txt").write_text("weights")
        job.write_plot("plots/sft.csv", [{{"step": 1, "loss": 0.5}}])
        job.write_metrics({{"loss": 0.5}})

run("sft", main)
"""

# a stage under way: a child of its own, a checkpoint, and no end
UNDER_WAY = """
    child = subprocess.Popen(["sleep", "600"])
    (job.folder / "checkpoints").mkdir(exist_ok=True)
    (job.folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
"""


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def workspace(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    for folder in ("data/raw", "toys", "runs"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    (tmp_path / "data/raw/rows.txt").write_text("hello")
    write_stages(tmp_path)
    return tmp_path


def write_stages(root: Path, before: str = "") -> None:
    (root / "toys/prepare.py").write_text(PREPARE.format(before=before.strip() or "pass"))
    (root / "toys/sft.py").write_text(SFT.format(before=before.strip() or "pass"))


def set_params(root: Path, **sections: dict) -> None:
    params = yaml.safe_load((root / "params.yaml").read_text())
    for name, values in sections.items():
        params[name] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(params))


def attempts(root: Path) -> int:
    return len((root / "runs/attempts").read_text().splitlines())


def run_folder(root: Path, stage: str = "prepare") -> Path:
    (folder,) = (root / "runs" / stage).iterdir()
    return folder


@pytest.fixture
def start(workspace: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start the launcher as a process of its own."""
    started = []

    def start(stage: str = "prepare", setting: str = "pass") -> subprocess.Popen:
        call = f"sys.exit(launch.launch('{stage}', pathlib.Path(), 'toys'))"
        code = f"import os, sys, pathlib; from rlhf.launcher import launch, processes; {setting}; {call}"
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=workspace, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def eventually(condition: Callable[[], object]) -> bool:
    """Whether the condition comes to hold; the limit only bounds a failing test."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def under_way(root: Path) -> list[int]:
    """The process ids of the stage under way."""
    assert eventually(lambda: [path for path in root.glob("runs/prepare/*/pids") if len(path.read_text().split()) == 2])
    return [int(pid) for pid in (run_folder(root) / "pids").read_text().split()]


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_outputs_are_published_and_scratch_is_cleaned(workspace: Path, capfd: pytest.CaptureFixture) -> None:
    older = workspace / "runs/prepare/0123456789abcdef/checkpoints"
    older.mkdir(parents=True)
    assert launch("prepare", workspace, "toys") == 0
    assert (workspace / "data/prepared/rows.txt").read_text() == "HELLO"
    assert json.loads((workspace / "metrics/prepare.json").read_text()) == {"rows": 1}
    assert "prepare 1/2 rows=1" in capfd.readouterr().out
    assert {"log.txt", "metrics.jsonl", "tracking.json"} <= {path.name for path in run_folder(workspace).iterdir()}
    assert not (run_folder(workspace) / "out").exists()


def test_what_the_end_of_the_process_does_fails_no_stage_that_has_done_its_work(workspace: Path) -> None:
    write_stages(workspace, "import atexit; atexit.register(os.abort)")
    assert launch("prepare", workspace, "toys") == 0
    assert (workspace / "data/prepared/rows.txt").exists()


def test_an_output_is_replaced_and_a_finished_run_starts_anew(workspace: Path) -> None:
    (workspace / "data/prepared").mkdir()
    (workspace / "data/prepared/stale.txt").touch()
    launch("prepare", workspace, "toys")
    assert not (workspace / "data/prepared/stale.txt").exists()
    launch("prepare", workspace, "toys")
    assert attempts(workspace) == 2
    assert len((run_folder(workspace) / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_failing_stage_publishes_nothing_and_shows_why(workspace: Path, capfd: pytest.CaptureFixture) -> None:
    write_stages(workspace, "raise ValueError('no luck')")
    assert launch("prepare", workspace, "toys") == 1
    shown = capfd.readouterr().err
    assert "ValueError: no luck" in shown
    assert "log.txt" in shown
    assert not (workspace / "data/prepared").exists()


def test_a_stage_that_names_its_error_is_not_drowned_in_log_lines(workspace: Path, capfd: pytest.CaptureFixture) -> None:
    write_stages(workspace, "job.say('working'); raise UserError('rows.txt: row 3 is empty', remedy='fill it')")
    assert launch("prepare", workspace, "toys") == 1
    captured = capfd.readouterr()
    assert "error: rows.txt: row 3 is empty" in captured.out
    assert "working" not in captured.err


def test_a_stage_that_ends_without_its_end_fails(workspace: Path) -> None:
    write_stages(workspace, "os._exit(0)")
    assert launch("prepare", workspace, "toys") == 1


def test_a_missing_input_names_the_stage_that_makes_it(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"data/prepared: input of stage sft.*dvc repro prepare"):
        launch("sft", workspace, "toys")


def test_a_changed_input_is_named_and_nothing_published(workspace: Path) -> None:
    write_stages(workspace, "(job.folder / 'checkpoints').mkdir(); job.input('data/raw/rows.txt').write_text('changed')")
    with pytest.raises(UserError, match=r"data/raw/rows.txt changed while stage prepare ran"):
        launch("prepare", workspace, "toys")
    assert not (workspace / "data/prepared").exists()
    assert not (run_folder(workspace) / "checkpoints").exists()


def test_a_missing_output_is_named(workspace: Path) -> None:
    (workspace / "dvc.yaml").write_text(GRAPH.replace("outs: [data/prepared]", "outs: [data/prepared, data/other.txt]"))
    with pytest.raises(UserError, match=r"did not write data/other.txt"):
        launch("prepare", workspace, "toys")
    assert not (workspace / "data/prepared").exists()


def test_an_unwritable_output_is_named_before_the_work(workspace: Path) -> None:
    (workspace / "metrics").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"metrics/prepare.json: output cannot be written"):
        launch("prepare", workspace, "toys")
    assert not (workspace / "runs/attempts").exists()


def test_a_stage_that_takes_too_long_is_stopped(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait

    def wait_once_begun(process: subprocess.Popen, timeout: float | None = None) -> int:
        """The time counts from when the stage is under way: on a busy machine it may take long to begin."""
        assert timeout is None or under_way(workspace)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_once_begun)
    write_stages(workspace, UNDER_WAY)
    set_params(workspace, launch={"timeout_minutes": 0.03})
    with pytest.raises(UserError, match=r"launch.timeout_minutes"):
        launch("prepare", workspace, "toys")
    assert gone(under_way(workspace))


def test_a_second_launch_of_a_stage_is_refused(workspace: Path, start: Callable[..., subprocess.Popen]) -> None:
    write_stages(workspace, UNDER_WAY)
    first = start()
    under_way(workspace)
    with pytest.raises(UserError, match=rf"stage prepare is being run already \(process {first.pid}\)"):
        launch("prepare", workspace, "toys")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_launcher_takes_its_processes_along(
    workspace: Path, start: Callable[..., subprocess.Popen], number: signal.Signals, code: int
) -> None:
    write_stages(workspace, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + UNDER_WAY)
    launcher = start(setting="processes.GRACE_SECONDS = 1")
    pids = under_way(workspace)
    launcher.send_signal(number)
    assert launcher.wait() == code
    assert gone(pids)


def test_a_killed_launcher_takes_its_processes_along_and_a_rerun_goes_on(workspace: Path, start: Callable[..., subprocess.Popen]) -> None:
    write_stages(workspace, "while not (job.root / 'runs/go_on').exists():" + UNDER_WAY.replace("\n    ", "\n        "))
    launcher = start()
    pids = under_way(workspace)
    folder = run_folder(workspace)
    launcher.kill()
    assert eventually(lambda: gone(pids) and not held(workspace, "prepare"))  # the guard that stops them holds the lock till then
    (workspace / "runs/go_on").touch()
    assert launch("prepare", workspace, "toys") == 0
    assert run_folder(workspace) == folder
    assert attempts(workspace) == 2


def test_a_launcher_killed_before_publishing_runs_nothing_again(workspace: Path, start: Callable[..., subprocess.Popen]) -> None:
    assert start(setting="launch.publish = lambda run: os.kill(os.getpid(), 9)").wait() == -signal.SIGKILL
    assert not (workspace / "data/prepared").exists()
    assert launch("prepare", workspace, "toys") == 0
    assert (workspace / "data/prepared/rows.txt").read_text() == "HELLO"
    assert attempts(workspace) == 1


def test_deepspeed_runs_the_ranks_and_models_get_their_lineage(workspace: Path, capfd: pytest.CaptureFixture) -> None:
    launch("prepare", workspace, "toys")
    set_params(workspace, launch={"accelerator": "cpu", "jobs": layouts(processes=2, threads=3)})
    assert launch("sft", workspace, "toys") == 0
    assert {path.name for path in run_folder(workspace, "sft").glob("rank-*")} == {"rank-0", "rank-1"}
    shown = capfd.readouterr().out
    assert "sft: one of 2 with 3 threads, mlflow False" in shown
    assert "[INFO]" not in shown
    lineage = json.loads((workspace / "models/sft/lineage.json").read_text())
    assert lineage["fingerprint"] == run_folder(workspace, "sft").name
    assert lineage["params"] == config.load(workspace / "params.yaml").of_stage("sft")
    assert set(lineage["inputs"]) == {"data/prepared/rows.txt", "toys/sft.py"}
    assert lineage["files"] == fingerprint.hash_inputs(workspace / "models/sft", ["model.txt"])


def test_a_killed_deepspeed_launcher_is_no_success(workspace: Path) -> None:
    launch("prepare", workspace, "toys")
    set_params(workspace, launch={"accelerator": "cpu", "jobs": layouts(processes=1, threads=1)})
    write_stages(workspace, "os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)")
    assert launch("sft", workspace, "toys") == 1
    assert not (workspace / "models/sft").exists()


def layouts(**layout: int) -> dict:
    return {stage: layout | {"micro_batch_tokens": 1} for stage in config.STAGES if stage != "prepare"}


def test_the_fingerprint_knows_params_and_content_but_not_where_it_runs(workspace: Path) -> None:
    def now() -> str:
        node = fingerprint.read_graph(workspace)["prepare"]
        params = config.load(workspace / "params.yaml").of_stage("prepare")
        return fingerprint.fingerprint("prepare", params, fingerprint.hash_inputs(workspace, node.inputs))

    first = now()
    set_params(workspace, launch={"timeout_minutes": 7}, sft={"epochs": 9})
    (workspace / "data/raw/__pycache__").mkdir()
    (workspace / "data/raw/__pycache__/rows.pyc").touch()
    os.utime(workspace / "data/raw/rows.txt", (0, 0))
    assert now() == first
    set_params(workspace, prepare={"max_characters": 999})
    second = now()
    (workspace / "data/raw/rows.txt").write_text("hello!")
    third = now()
    (workspace / "data/raw/rows.txt").rename(workspace / "data/raw/renamed.txt")
    assert len({first, second, third, now()}) == 4


def test_a_busy_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"launch.port \d+ cannot be used"):
            command.choose_port(taken.getsockname()[1])


def test_a_given_base_model_that_is_missing_is_named(workspace: Path) -> None:
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    given = {"source": "pretrained", "model": "./models/mine", "revision": None, "trust_remote_code": False, "chat_template": "turns"}
    with pytest.raises(UserError, match=r"base.model ./models/mine: no such folder"):
        check_base(workspace, "base", config.validate(params | {"base": given}, "params.yaml"))
    check_base(workspace, "base", config.validate(params | {"base": given | {"model": "owner/name"}}, "params.yaml"))


def test_gpus_are_those_that_the_environment_leaves_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.find_gpus("cpu") == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command.find_gpus("cuda") == [0, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert command.find_gpus("cuda") == [3, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f1c,GPU-77ab")
    with pytest.raises(UserError, match="by their numbers alone"):
        command.find_gpus("cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="torch sees no GPU"):
        command.find_gpus("cuda")


def test_stages_share_the_gpus(workspace: Path) -> None:
    with command.hold_gpus(workspace, "sft", [0, 1, 2], 2) as first, command.hold_gpus(workspace, "reward", [0, 1, 2], 1) as second:
        assert (first, second) == ([0, 1], [2])
    with command.hold_gpus(workspace, "sft", [0, 1, 2], 1) as again:
        assert again == [0]
    with (
        pytest.raises(UserError, match=r"launch.jobs.ppo.processes is 4, but there are 3 GPUs"),
        command.hold_gpus(workspace, "ppo", [0, 1, 2], 4),
    ):
        pass


def test_an_unknown_stage_is_refused(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"no stage 'sfd'.*one of prepare, sft"):
        launch("sfd", workspace, "toys")
