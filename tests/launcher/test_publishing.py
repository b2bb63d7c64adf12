"""What the launcher makes of a run that somebody or something interfered with: nothing wrong is published, and nothing trained twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf.errors import UserError
from rlhf.launcher.launch import forget_committed, launch
from rlhf.workspace import fingerprint
from tasks import graph
from tests.launcher.test_launch import (  # noqa: F401 — two are fixtures
    GRAPH,
    UNDER_WAY,
    attempts,
    database,
    eventually,
    gone,
    run_folder,
    under_way,
    workspace,
    write_stages,
)

EDIT_PARAMS = """
    path = job.root / "params.yaml"
    path.write_text(path.read_text().replace("max_characters: 1000", "max_characters: 999"))
"""

CUT_OFF = """
    if not (job.root / "runs/again").exists():
        (job.folder / "metrics.jsonl").write_text('{"step": 1, "total": 2, "metrics": {}}\\n{"step": 2, "to')
        os._exit(9)
"""


def commit(root: Path, stage: str) -> None:
    """As DVC does it: the hashes of a stage's outputs, here of its metrics, go into dvc.lock."""
    path = f"metrics/{stage}.json"
    entry = {"cmd": "true", "outs": [{"path": path, "md5": fingerprint.md5(root / path)}]}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {stage: entry}}))


def test_values_edited_meanwhile_are_refused_and_set_back_nothing_is_trained_again(workspace: Path) -> None:  # noqa: F811
    write_stages(workspace, EDIT_PARAMS)
    before = (workspace / "params.yaml").read_text()
    with pytest.raises(UserError, match=r"params.yaml: values of stage prepare changed while it ran: nothing was published"):
        launch("prepare", workspace, "toys")
    assert not (workspace / "data/prepared").exists()
    (workspace / "params.yaml").write_text(before)
    assert launch("prepare", workspace, "toys") == 0
    assert (workspace / "data/prepared/rows.txt").read_text() == "HELLO"
    assert attempts(workspace) == 1


def test_what_dvc_could_not_take_is_published_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("DVC_STAGE", "prepare")
    assert launch("prepare", workspace, "toys") == 0
    # the disk was full: DVC has removed the outputs to run the stage once more
    (workspace / "data/prepared/rows.txt").unlink()
    assert launch("prepare", workspace, "toys") == 0
    assert (workspace / "data/prepared/rows.txt").read_text() == "HELLO"
    assert attempts(workspace) == 1
    # once DVC has it, the launcher's own copy goes, and a stage that is wanted again runs again
    commit(workspace, "prepare")
    forget_committed(workspace)
    assert not (run_folder(workspace) / "out").exists()
    assert launch("prepare", workspace, "toys") == 0
    assert attempts(workspace) == 2


def test_a_line_that_was_cut_off_is_not_written_on(workspace: Path) -> None:  # noqa: F811
    write_stages(workspace, CUT_OFF)
    assert launch("prepare", workspace, "toys") == 9
    (workspace / "runs/again").touch()
    assert launch("prepare", workspace, "toys") == 0
    lines = (run_folder(workspace) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1]


def test_a_model_that_changed_on_the_disk_is_not_trained_on(workspace: Path) -> None:  # noqa: F811
    model = workspace / "models/base"
    model.mkdir(parents=True)
    (model / "model.txt").write_text("weights")
    (model / "lineage.json").write_text(json.dumps({"stage": "base", "files": fingerprint.hash_inputs(model, ["."])}))
    stages = yaml.safe_load((workspace / "dvc.yaml").read_text())["stages"]
    stages["prepare"]["deps"].append("models/base")
    (workspace / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    assert launch("prepare", workspace, "toys") == 0
    (model / "model.txt").write_text("weight5")
    with pytest.raises(UserError, match=r"^models/base/model.txt: not as stage base wrote it"):
        launch("prepare", workspace, "toys")


def test_a_killed_flow_takes_the_stage_along(workspace: Path) -> None:  # noqa: F811
    write_stages(workspace, UNDER_WAY)
    flow = subprocess.Popen(["sleep", "600"])
    call = "import sys; from pathlib import Path; from rlhf.launcher.launch import launch; sys.exit(launch('prepare', Path(), 'toys'))"
    environment = os.environ | {"RLHF_FLOW_PID": str(flow.pid)}
    launcher = subprocess.Popen([sys.executable, "-c", call], cwd=workspace, env=environment)
    pids = under_way(workspace)
    flow.kill()
    flow.wait()
    assert launcher.wait() == 143
    assert eventually(lambda: gone(pids))


def test_what_a_killed_dvc_leaves_half_done_is_removed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    locks, runs = tmp_path / ".dvc/tmp/rwlock", tmp_path / ".dvc/cache/runs/ab"
    (runs / "abc").mkdir(parents=True)
    (runs / "abd").mkdir()
    (runs / "abd/entry").touch()
    locks.write_text('{"read": {')
    long_ago = time.time() - 60
    for entry in (runs / "abc", runs / "abd"):
        os.utime(entry, (long_ago, long_ago))
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  sft:\n    cm")
    graph.mend(tmp_path)
    assert not (tmp_path / "dvc.lock").exists()
    assert not locks.exists()
    assert [path.name for path in runs.iterdir()] == ["abd"]


def test_a_killed_dvc_takes_the_stage_along(workspace: Path) -> None:  # noqa: F811
    write_stages(workspace, UNDER_WAY)
    call = "import pathlib, sys; from rlhf.launcher.launch import launch; sys.exit(launch('prepare', pathlib.Path(), 'toys'))"
    content = yaml.safe_load(GRAPH)
    for name in content["stages"]:
        content["stages"][name]["cmd"] = f'{sys.executable} -c "{call}"'
    (workspace / "dvc.yaml").write_text(yaml.safe_dump(content))
    dvc = [sys.executable, "-m", "dvc"]
    environment = os.environ | {"DVC_NO_ANALYTICS": "true", "DVC_SITE_CACHE_DIR": str(workspace / "site")}
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=workspace, env=environment, check=True)
    repro = subprocess.Popen([*dvc, "repro", "prepare"], cwd=workspace, env=environment, stdout=subprocess.DEVNULL)
    pids = under_way(workspace)
    repro.kill()
    repro.wait()
    assert eventually(lambda: gone(pids))
