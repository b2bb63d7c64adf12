"""Versions that can be had again: the commit of a run, beside the user's own work, and its check in a fresh checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config, registry
from rlhf.cli import main as cli
from rlhf.errors import UserError
from rlhf.registry import verify
from rlhf.workspace import snapshot

PROJECT = Path(__file__).parents[2]
DVC = str(Path(sys.executable).with_name("dvc"))


def git(root: Path, *words: str) -> str:
    name = ("-c", "user.name=user", "-c", "user.email=user@localhost")
    return subprocess.run(["git", *name, *words], cwd=root, capture_output=True, text=True, check=True).stdout


def dvc(root: Path, *words: str) -> None:
    subprocess.run([DVC, *words, "--quiet"], cwd=root, check=True)


def load(root: Path) -> config.Params:
    return config.load(root / "params.yaml")


def state(root: Path) -> list[str]:
    """All that is the user's: what is checked out, the index, the working tree."""
    return [
        git(root, "symbolic-ref", "HEAD"),
        git(root, "rev-parse", "HEAD"),
        git(root, "ls-files", "--stage"),
        git(root, "diff"),
        git(root, "status", "--porcelain", "--", ":(exclude)runs"),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A workspace whose run is registered as version 1, with a user at work in it; his state before and after."""
    root = tmp_path_factory.mktemp("workspace")
    git(root, "init", "--quiet")
    dvc(root, "init")
    dvc(root, "config", "cache.type", "reflink,hardlink,copy")
    (root / ".gitignore").write_text("/models\n/mlruns\n/runs\n/data/answers.jsonl\n/metrics/ppo.json\n", encoding="utf-8")
    (root / "params.yaml").write_text((PROJECT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "train.sh").write_text("echo committed\n", encoding="utf-8")
    # a stage that makes a small model of its raw data, its code and a value of params.yaml
    command = "mkdir -p models/ppo metrics data && cat data/raw/rows.jsonl train.sh > models/ppo/model.safetensors"
    command += " && cp code.py models/ppo/config.json && echo '{}' | tee data/answers.jsonl metrics/evaluate.json metrics/ppo.json"
    stage: dict[str, Any] = {
        "cmd": command,
        "deps": ["data/raw", "train.sh", "code.py"],
        "params": ["seed"],
        "outs": ["models/ppo", "data/answers.jsonl", "metrics/ppo.json"],  # most numbers are in DVC's cache, and not in git
    }
    stage |= {"metrics": [{"metrics/evaluate.json": {"cache": False}}]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": stage}}), encoding="utf-8")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    (root / "data/raw").mkdir(parents=True)
    (root / "data/raw/rows.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    dvc(root, "add", "data/raw/rows.jsonl")
    # the user is at work: something staged, something not, something new that the run reads, something new that it does not
    (root / "train.sh").write_text("echo staged\n", encoding="utf-8")
    git(root, "add", "train.sh")
    (root / "train.sh").write_text("echo by the user\n", encoding="utf-8")
    (root / "code.py").write_text("{}\n", encoding="utf-8")
    (root / "notes.txt").write_text("private\n", encoding="utf-8")
    dvc(root, "repro")
    (root / "models/ppo/lineage.json").write_text(json.dumps({"fingerprint": "f00d"}), encoding="utf-8")
    dvc(root, "commit", "--force", "ppo")
    before = state(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert registry.register(root, load(root)).number == 1
    return root, before, state(root)


@pytest.fixture
def root(made: tuple[Path, list[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made[0])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made[0]


def check(root: Path, *, retrain: bool = False) -> list[str]:
    said: list[str] = []
    verify.verify(registry.find(root, load(root), 1), root, load(root), retrain=retrain, say=said.append)
    return said


def test_the_run_is_committed_beside_the_work_of_the_user(made: tuple[Path, list[str], list[str]], root: Path) -> None:
    _, before, after = made
    assert after == before
    revision = registry.find(root, load(root), 1).tags["git.revision"]
    assert git(root, "rev-parse", "refs/tags/assistant-v1").strip() == revision
    assert git(root, "for-each-ref", "--format=%(objectname)", "refs/heads/rlhf/").split() == [revision]
    assert git(root, "rev-parse", f"{revision}^") == git(root, "rev-parse", "HEAD")
    # what the run used is in it, as it used it; a file that no stage reads is not
    names = set(git(root, "ls-tree", "-r", "--name-only", revision).split())
    assert {"dvc.lock", "metrics/evaluate.json", "data/raw/rows.jsonl.dvc", "data/raw/.gitignore", "code.py", "train.sh"} <= names
    assert not {"notes.txt", "data/raw/rows.jsonl", "models/ppo/model.safetensors"} & names
    assert git(root, "show", f"{revision}:train.sh") == "echo by the user\n"
    assert git(root, "log", "-1", "--format=%an", revision) == "rlhf\n"
    # the same once more is the same commit, and a tag that a kill kept from being set comes with the same version
    assert snapshot.commit(root, "again") == revision
    git(root, "tag", "-d", "assistant-v1")
    assert registry.register(root, load(root)).number == 1
    assert git(root, "rev-parse", "refs/tags/assistant-v1").strip() == revision


def test_a_version_is_had_again(root: Path) -> None:
    before = state(root)
    said = check(root)
    assert [line.split()[0] for line in said] == ["checked", "5", "`dvc", "models/ppo"]
    assert state(root) == before
    assert not list((root / "runs").glob("verify-*"))


def test_training_again_is_compared_byte_by_byte(root: Path, made: tuple[Path, list[str], list[str]]) -> None:
    # this stage does not write lineage.json, which was put there by hand
    with pytest.raises(UserError) as caught:
        check(root, retrain=True)
    assert caught.value.what == "version 1: models/ppo/lineage.json has other bytes after training again"


@pytest.mark.parametrize("path", ["models/ppo/model.safetensors", "data/raw/rows.jsonl"])
def test_a_changed_byte_in_the_cache_is_named_and_a_remote_mends_it(root: Path, path: str, tmp_path: Path) -> None:
    content = (root / path).read_bytes()
    objects = [place for place in (root / ".dvc/cache/files/md5").glob("*/*") if place.read_bytes() == content]
    assert len(objects) == 1
    backup = shutil.copy(objects[0], tmp_path / "backup")
    objects[0].unlink()
    objects[0].write_bytes(b"?" + content[1:])
    objects[0].chmod(0o444)
    with pytest.raises(UserError) as caught:
        check(root)
    assert caught.value.what == f"{path} has other bytes in the DVC cache ({objects[0]})"

    objects[0].unlink()
    with pytest.raises(UserError, match=f"{path} is missing in the DVC cache"):
        check(root)
    remote = tmp_path / "remote/files/md5" / objects[0].parent.name
    remote.mkdir(parents=True)
    shutil.copy(backup, remote / objects[0].name)
    dvc(root, "remote", "add", "--local", "--default", "here", str(tmp_path / "remote"))
    # what else there is the cache has already
    assert check(root)[-1].startswith("models/ppo has the hash of the registry")
    dvc(root, "remote", "remove", "--local", "here")


def test_lineage_names_all_that_a_version_was_made_of(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = registry.find(root, load(root), 1).tags
    monkeypatch.setattr(sys, "argv", ["rlhf", "lineage", "1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    said = capsys.readouterr().out
    locked = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]["ppo"]["outs"]
    raw = yaml.safe_load((root / "data/raw/rows.jsonl.dvc").read_text(encoding="utf-8"))["outs"][0]["md5"]
    for part in (tags["git.revision"], tags["git.head"], tags["sha256"], tags["params"], f"data/raw/rows.jsonl {raw}", "f00d"):
        assert part in said
    assert all(out["md5"] in said for out in locked if out["path"].startswith("models"))


def test_a_revision_that_is_not_here_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="git revision 0123456789 is not in"):
        snapshot.checkout(root, "0123456789", tmp_path / "checkout")
