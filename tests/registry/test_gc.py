"""`rlhf gc`: what nothing needs goes, and every registered version can still be had again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.cli import main as dvc_main

from rlhf import config, registry, tracking
from rlhf.cli import main as cli
from rlhf.errors import UserError
from rlhf.launcher import launch
from rlhf.locks import lock
from rlhf.registry import gc, verify
from rlhf.registry.versions import connect
from rlhf.workspace.fingerprint import fingerprint, read_graph

PROJECT = Path(__file__).parents[2]


def git(root: Path, *words: str) -> str:
    name = ("-c", "user.name=user", "-c", "user.email=user@localhost")
    return subprocess.run(["git", *name, *words], cwd=root, capture_output=True, text=True, check=True).stdout


def dvc(*words: str) -> None:
    assert dvc_main([*words, "--quiet"]) == 0


def load(root: Path) -> config.Params:
    return config.load(root / "params.yaml")


def make(root: Path, seed: int) -> None:
    """Run the pipeline with a seed; its model, answers and metrics are different for each."""
    raw = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8")) | {"seed": seed}
    (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (root / "made/model.safetensors").write_text(f"weights of seed {seed}\n" * 1000, encoding="utf-8")
    (root / "made/lineage.json").write_text(json.dumps({"fingerprint": f"f00d{seed}"}), encoding="utf-8")
    dvc("repro")


def cached(root: Path, text: str) -> bool:
    """Whether the DVC cache holds a file that begins like this."""
    return any(path.read_bytes().startswith(text.encode()) for path in (root / ".dvc/cache/files/md5").glob("*/*"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with versions 1 and 2, made with seeds 1 and 2, and a deleted version 3, of seed 3."""
    root = tmp_path_factory.mktemp("gc") / "workspace"
    (root / "made").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("DVC_SITE_CACHE_DIR", str(root.parent / "site"))
        fill(root)
        yield root


def fill(root: Path) -> None:
    git(root, "init", "--quiet")
    dvc("init")
    dvc("config", "cache.type", "reflink,hardlink,copy")
    (root / ".gitignore").write_text("/attempts\n/models\n/mlruns\n/runs\n/data/answers.jsonl\n", encoding="utf-8")
    (root / "made/config.json").write_text("{}\n", encoding="utf-8")
    command = "echo once >> attempts; mkdir -p models metrics data && cp -r made models/ppo"
    stage: dict[str, Any] = {
        "cmd": f"{command} && echo '{{}}' | tee data/answers.jsonl metrics/evaluate.json",
        "deps": ["made"],
        "params": ["seed"],
        "outs": ["models/ppo", "data/answers.jsonl"],
        "metrics": [{"metrics/evaluate.json": {"cache": False}}],
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": stage}}), encoding="utf-8")
    (root / "params.yaml").touch()
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    for number in (1, 2, 3):
        make(root, number)
        assert registry.register(root, load(root)).number == number
    # something that a run made and nobody registered, and the workspace as version 1 had it
    make(root, 4)
    make(root, 1)
    connect(root, load(root)).delete_model_version("assistant", "3")


def run_gc(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["rlhf", "gc", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    return capsys.readouterr().out


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file() and not {".git", "locks", "tmp"} & set(path.relative_to(root).parts)}


def test_it_works_alone_and_says_what_it_cannot_know(root: Path, tmp_path: Path) -> None:
    params = load(root)
    for name in ("flow", "ppo", "verify"):
        with lock(root, name), pytest.raises(UserError, match="is running in this workspace"), gc.alone(root, params):
            pass
    # a version from elsewhere, whose commit is not here
    client = connect(root, params)
    own = registry.find(root, params, 2).tags["git.revision"]
    client.set_model_version_tag("assistant", "2", "git.revision", "0" * 40)
    with gc.alone(root, params):
        found = gc.find(root, params)
    assert "revision 0000000000000000000000000000000000000000 of version 2 is not here" in found.notes[0]
    assert not any("DVC" in leftover.what for leftover in found.leftovers)
    client.set_model_version_tag("assistant", "2", "git.revision", own)
    # a cache that other workspaces use, too
    dvc("config", "--local", "cache.dir", str(tmp_path))
    with gc.alone(root, params):
        assert "is outside this workspace" in gc.find(root, params).notes[0]
    dvc("config", "--local", "--unset", "cache.dir")


def test_only_what_nothing_needs_goes(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    params = load(root)
    # a run of other inputs, one that the next run goes on from, one that is done, and what a killed `rlhf verify` left
    node = read_graph(root)["ppo"]
    now = fingerprint("ppo", params.of_stage("ppo"), launch.hash_inputs(root, params, node))
    for folder in (f"ppo/{now}", "ppo/0123456789abcdef", "ppo/fedcba9876543210", "dpo/0123456789abcdef", "verify-abc"):
        (root / "runs" / folder / "checkpoints").mkdir(parents=True)
        (root / "runs" / folder / "checkpoints/weights").write_bytes(b"0" * 1000)
    (root / "runs/ppo/fedcba9876543210/PUBLISHED").touch()
    client = tracking.client(root, params)
    run = client.create_run(tracking.initialise(root, params)).info
    client.log_text(run.run_id, "of a run", "note.txt")
    client.delete_run(run.run_id)
    before = files(root)

    listed = run_gc(root, capsys, monkeypatch, "--dry-run")
    assert files(root) == before
    assert "git tag -d assistant-v3 && git branch -D rlhf/" in listed
    assert "scratch of ppo, 0123456789abcdef" in listed
    assert now not in listed
    assert "MiB would be free again" in listed

    # a tag and a branch name version 3's data, though it is deleted
    run_gc(root, capsys, monkeypatch)
    assert [cached(root, f"weights of seed {seed}") for seed in (1, 2, 3, 4)] == [True, True, True, False]
    folders = sorted(str(path.relative_to(root / "runs")) for path in root.glob("runs/*/*") if path.parent.name in ("ppo", "dpo"))
    assert folders == sorted(["ppo/fedcba9876543210", f"ppo/{now}"])
    assert (root / f"runs/ppo/{now}/checkpoints/weights").exists()
    assert not (root / "runs/ppo/fedcba9876543210/checkpoints").exists()
    assert not (root / "runs/verify-abc").exists()
    assert len(list((root / "mlruns/artifacts/models").iterdir())) == 2
    assert not list((root / "mlruns/artifacts").glob(f"{run.run_id}/artifacts/*"))

    git(root, "tag", "-d", "assistant-v3")
    revisions = {version.tags["git.revision"] for version in registry.versions(root, params)}
    branches = git(root, "for-each-ref", "--format=%(objectname) %(refname:lstrip=2)", "refs/heads/rlhf").splitlines()
    git(root, "branch", "-D", *(name for revision, name in map(str.split, branches) if revision not in revisions))
    run_gc(root, capsys, monkeypatch)
    assert [cached(root, f"weights of seed {seed}") for seed in (1, 2, 3, 4)] == [True, True, False, False]

    # both versions can be had again, nothing is left to remove, and the run cache still spares the stage its work
    for number in (1, 2):
        verify.verify(registry.find(root, params, number), root, params, retrain=False, say=lambda _: None)
    with gc.alone(root, params):
        assert gc.find(root, params) == gc.Found([], [])
        # nor is it while params name another line of models
        other = params.model_copy(update={"promote": params.promote.model_copy(update={"model": "assistant-other"})})
        assert gc.find(root, other) == gc.Found([], [])
    (root / "dvc.lock").unlink()
    shutil.rmtree(root / "models")
    attempts = (root / "attempts").read_text(encoding="utf-8")
    dvc("repro")
    assert (root / "attempts").read_text(encoding="utf-8") == attempts
    assert (root / "models/ppo/model.safetensors").read_text(encoding="utf-8").startswith("weights of seed 1")


def test_what_is_linked_elsewhere_frees_nothing(tmp_path: Path) -> None:
    one, two, kept = tmp_path / "one", tmp_path / "two", tmp_path / "kept"
    one.mkdir()
    (one / "file").write_bytes(b"0" * 1000)
    (one / "other").write_bytes(b"0" * 10)
    two.hardlink_to(one / "file")
    kept.hardlink_to(one / "file")
    assert gc.size([one, two]) == 2010
    assert gc.freed([one, two]) == 10
    assert gc.freed([one, two, kept]) == 1010
