"""A workspace that was moved or copied keeps its models, and one in a folder with an odd name has some at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import registry, tracking
from rlhf.registry import gc, serving
from rlhf.tracking import store
from tests.registry.workspaces import load, train, workspace

PROJECT = Path(__file__).parents[2]
Make = Callable[[Path], Path]


def rlhf(root: Path, *words: str, questions: str | None = None) -> str:
    """A command in a process of its own, as people give it; what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "rlhf.cli", *words]
    done = subprocess.run(command, cwd=root, env=environment, input=questions, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def places(root: Path) -> dict[str, list[str]]:
    """Every place that the workspace's database names."""
    with closing(sqlite3.connect(root / "mlruns/mlflow.db")) as database:
        return {table: [row[0] for row in database.execute(f"SELECT {column} FROM {table}")] for table, column in store.PLACES.items()}


def contents(root: Path) -> dict[str, tuple[bytes, float]]:
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def make(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return lambda root: workspace(root, llama, tokenizer)


@pytest.mark.parametrize("moved", [True, False])
def test_a_workspace_that_was_moved_or_copied_works_where_it_is(
    make: Make, tmp_path: Path, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make(tmp_path / "old"), tmp_path / "new"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow has set it to the old place, for this process
    subprocess.run(["mv" if moved else "cp", *([] if moved else ["-r"]), old, new], check=True)
    before = None if moved else contents(old)

    assert rlhf(new, "chat", "--max-tokens", "4", questions="hello\n")
    assert all(place.startswith((new / "mlruns").as_uri()) for found in places(new).values() for place in found)
    # a new run and its version go where the workspace is
    train(new, 2)
    version = registry.register(new, load(new))
    assert version.number == 2
    assert registry.model_folder(version.uri, new, load(new)).is_relative_to(new)
    assert "version 2 is champion" in rlhf(new, "promote", "2")
    run = tracking.run_of("f00d1", new, load(new))
    assert run
    assert [artifact.path for artifact in tracking.client(new, load(new)).list_artifacts(run)] == ["note.txt"]
    # a deleted version's files are found, and only here
    tracking.client(new, load(new)).delete_model_version("assistant", "1")
    with gc.alone(new, load(new)):
        leftovers = [leftover for leftover in gc.find(new, load(new)).leftovers if leftover.model]
        gc.remove(new, load(new), leftovers)
    assert [leftover.paths[0].is_relative_to(new) for leftover in leftovers] == [True]
    assert len(list((new / "mlruns/artifacts/models").iterdir())) == 1
    if moved:
        assert not old.exists()
    else:
        assert contents(old) == before


def test_what_lies_elsewhere_on_purpose_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "root"
    root.mkdir()
    shutil.copyfile(PROJECT / "params.yaml", root / "params.yaml")
    tracking.initialise(root, load(root))
    kept = ["s3://bucket/mlruns/1", str(tmp_path / "archive")]
    client = tracking.client(root, load(root))
    for number, place in enumerate(kept):
        client.create_experiment(f"mine {number}", artifact_location=place)
    root = root.rename(tmp_path / "new")
    tracking.initialise(root, load(root))
    assert set(kept) < set(places(root)["experiments"])


@pytest.mark.parametrize("name", ["50%25", "a b", "c#d", "é", "100%"])
def test_a_folder_may_have_any_name(make: Make, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the project's code lies in such a folder, too
    (tmp_path / name).mkdir()
    monkeypatch.setattr(serving, "__file__", str(shutil.copy(serving.__file__, tmp_path / name / "serving.py")))
    root = make(tmp_path / name)
    run = tracking.run_of("f00d1", root, load(root))
    assert run
    assert [artifact.path for artifact in tracking.client(root, load(root)).list_artifacts(run)] == ["note.txt"]
    folder = registry.model_folder("models:/assistant@champion", root, load(root))
    assert folder.is_relative_to(root)
    assert (folder / "model.safetensors").samefile(root / "models/ppo/model.safetensors")
    if name != "50%25":  # MLflow's own loader reads a path as an address twice
        assert len(mlflow.pyfunc.load_model("models:/assistant@champion").predict(["hello"])) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
