"""What a run may be asked for: values of its own, a reason, a stage to stop after."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from flows.retrain import Until, retrain
from rlhf import config, registry
from rlhf.errors import UserError
from rlhf.workspace import one_run
from tests.flows.workspaces import artifacts, pipeline, whole_pipeline

PROJECT = Path(__file__).parents[2]


def with_graphs(root: Path) -> None:
    """The small pipeline, with a value that one of its stages depends on, and the graphs that dvc.yaml is written from."""
    whole_pipeline(root)
    graph = yaml.safe_load((root / "dvc.yaml").read_text())
    graph["stages"]["ppo"] |= {"params": ["ppo.steps"]}
    pipeline(root, graph["stages"])
    (root / "graphs").mkdir()
    shutil.copy(root / "dvc.yaml", root / "graphs" / "common.yaml")
    for part in ("reward", "ppo"):
        (root / "graphs" / f"{part}.yaml").touch()


def test_values_and_a_reason_are_of_one_run(root: Path) -> None:
    with_graphs(root)
    before = (root / "params.yaml").read_bytes()

    wrong: Any
    for wrong in ({"values": ["ppo.stepz=7"]}, {"values": ["ppo.steps=-7"]}, {"until": "dpo"}, {"reason": "x" * 1501}):
        with pytest.raises(UserError):
            retrain(root, **wrong)
        assert (root / "params.yaml").read_bytes() == before
        assert not (root / "models").exists()

    stopped: Any = retrain(root, until="ppo", return_state=True)
    assert (stopped.name, stopped.message) == ("stopped", "stopped after stage ppo, as asked: nothing was registered")
    assert (root / "models").exists()
    assert not (root / "metrics").exists()

    retrain(root, values=["ppo.steps=7"], reason="is seven enough?")
    assert (root / "params.yaml").read_bytes() == before
    assert yaml.safe_load((root / "dvc.lock").read_text())["stages"]["ppo"]["params"]["params.yaml"] == {"ppo.steps": 7}
    committed = subprocess.run(["git", "show", "assistant-v1:params.yaml"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(committed)["ppo"]["steps"] == 7
    params = config.load(root / "params.yaml")
    [version] = registry.versions(root, params)
    assert (version.tags["values"], version.tags["reason"]) == ("ppo.steps=7", "is seven enough?")
    [move] = registry.moves(root, params)
    assert move.why.startswith("is seven enough?; flow run ")
    assert "reason: is seven enough?\n\nvalues: ppo.steps=7" in str(artifacts("decision")[-1].data)

    # the next run is of params.yaml as it is
    assert retrain(root)["stages"]["ppo"] == "done"
    assert yaml.safe_load((root / "dvc.lock").read_text())["stages"]["ppo"]["params"]["params.yaml"] == {"ppo.steps": params.ppo.steps}


def test_what_a_killed_run_left_of_its_values_is_put_back_unless_it_was_edited(root: Path) -> None:
    with_graphs(root)
    before = (root / "params.yaml").read_bytes()
    script = (
        f"import os, pathlib; from rlhf.workspace import one_run\nwith one_run.values(pathlib.Path({str(root)!r}), ['seed=7']): os._exit(9)"
    )
    for edit in ("", "# mine\n"):
        assert subprocess.run([sys.executable, "-c", script], check=False, cwd=PROJECT).returncode == 9
        assert config.load(root / "params.yaml").seed == 7
        with (root / "params.yaml").open("a") as file:
            file.write(edit)
        with one_run.values(root, []):
            assert ((root / "params.yaml").read_bytes() == before) is not bool(edit)


def test_the_form_offers_all_stages() -> None:
    assert get_args(Until) == config.STAGES
