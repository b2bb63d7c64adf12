"""Answers of earlier versions, brought into a workspace as data that DVC versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config, registry
from rlhf.data import earlier as data
from rlhf.errors import UserError
from rlhf.job import read_lines, write_lines
from rlhf.registry import earlier
from rlhf.workspace import presets
from tests.registry.test_verify import PROJECT, dvc, git, load

PROMPT = [{"role": "user", "content": "What is hot?"}]

EVALUATED = {"prompt": PROMPT, "gold": None, "answers": {"sft": "Ice.", "ppo": "Snow."}}  # of a version that does not say what was cut off


def rollout(answer: str, **more: Any) -> dict[str, Any]:
    about = {"step": 1, "prompt": PROMPT, "gold": {"secret": 1}, "reference": "cold", "kl": 0.1, "score": 2.0}
    return about | {"answer": answer} | more


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which a run left rollouts and an evaluation behind, not registered yet."""
    root = tmp_path_factory.mktemp("earlier") / "workspace"
    (root / "data/raw").mkdir(parents=True)
    git(root, "init", "--quiet")
    dvc(root, "init")
    (root / ".gitignore").write_text("/models\n/mlruns\n/runs\n/data/*.jsonl\n", encoding="utf-8")
    for name in ("presets", "graphs"):
        shutil.copytree(PROJECT / name, root / name)
    shutil.copyfile(PROJECT / "params.yaml", root / "params.yaml")
    stage = {"cmd": "true", "outs": ["models/ppo", "data/answers.jsonl", "data/rollouts.jsonl"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": stage}}), encoding="utf-8")
    for folder in ("models/ppo", "metrics"):
        (root / folder).mkdir(parents=True)
    (root / "models/ppo/model.safetensors").write_bytes(b"weights")
    (root / "models/ppo/config.json").write_text("{}", encoding="utf-8")
    (root / "models/ppo/lineage.json").write_text(json.dumps({"fingerprint": "f00d"}), encoding="utf-8")
    (root / "metrics/evaluate.json").write_text("{}", encoding="utf-8")
    write_lines(root / "data/rollouts.jsonl", [rollout("Cold.", ended=True), rollout("Not so", ended=False)])
    write_lines(root / "data/answers.jsonl", [EVALUATED, EVALUATED | {"ended": {"sft": False, "ppo": True}}])
    dvc(root, "commit", "--force")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    return root


@pytest.fixture
def root(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


def with_versions(root: Path, count: int) -> config.Params:
    raw = load(root).model_dump(mode="json")
    raw["awac"]["versions"] = count
    return config.validate(raw, "params.yaml")


def test_earlier_answers_become_data_of_the_workspace(root: Path) -> None:
    assert earlier.bring(root, with_versions(root, 0)) == []
    with pytest.raises(UserError, match=r"awac\.versions is 2, but there is no version of assistant yet to learn from"):
        presets.use(root, "sandbox", ["awac.versions=2"], lambda params: earlier.bring(root, params))
    assert load(root).awac.versions == 0  # nothing was written
    registry.register(root, load(root))
    write_lines(root / "data/raw/ratings/day.jsonl", [{"prompt": PROMPT, "chosen": "A.", "rejected": "B."}])
    (root / "data/rollouts.jsonl").unlink()  # DVC's cache has it
    said = presets.use(root, "sandbox", ["awac.versions=2"], lambda params: earlier.bring(root, params))
    assert "answers of earlier versions in data/raw/earlier: v1 6, ratings 2" in said
    assert "versioned data/raw/earlier with DVC: commit data/raw/earlier.dvc" in said
    about = {"prompt": PROMPT, "reference": "cold"}
    found = [about | {"answer": "Cold.", "ended": True}, about | {"answer": "Not so", "ended": False}]
    ends = (("Ice.", True), ("Snow.", True), ("Ice.", False), ("Snow.", True))
    evaluated = [{"prompt": PROMPT, "answer": word, "ended": ended} for word, ended in ends]
    assert read_lines(root / data.FOLDER / "v1.jsonl") == found + evaluated
    assert [line["answer"] for line in read_lines(root / data.FOLDER / "ratings.jsonl")] == ["A.", "B."]
    assert (root / "data/raw/earlier.dvc").is_file()
    graph = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert tuple(graph) == load(root).stages == ("prepare", "base", "sft", "reward", "awac", "ppo", "evaluate")
    # again: the same bytes, and DVC has nothing to add
    before = (root / "data/raw/earlier.dvc").read_bytes()
    earlier.bring(root, load(root))
    assert (root / "data/raw/earlier.dvc").read_bytes() == before


def test_what_cannot_be_learnt_from_is_refused_before_anything_trains(root: Path) -> None:
    registry.register(root, load(root))
    raw = with_versions(root, 1).model_dump(mode="json")
    raw["data"]["sources"][0]["name"] = "earlier"
    with pytest.raises(UserError, match="a source is named earlier"):
        earlier.bring(root, config.validate(raw, "params.yaml"))
    cache = [path for path in (root / ".dvc/cache/files/md5").glob("*/*") if b"Not so" in path.read_bytes()]
    for path in cache:
        path.chmod(0o644)
        path.write_text(json.dumps(rollout("Forged.")) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data/rollouts\.jsonl"):
        earlier.bring(root, with_versions(root, 1))
    for path in cache:
        path.unlink()
    with pytest.raises(UserError, match=r"version 1: data/rollouts\.jsonl cannot be had"):
        earlier.bring(root, with_versions(root, 1))


def test_a_prompt_with_one_answer_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no answers of earlier versions"):
        data.read(tmp_path)
    write_lines(tmp_path / "v1.jsonl", [rollout("Cold."), rollout("So", ended=False)])
    with pytest.raises(UserError, match=r"of 2 answers no two are to one prompt .* \(0 held out, 1 cut off, 0 too long, 1 alone\)"):
        data.usable(data.read(tmp_path))
    (tmp_path / "v2.jsonl").write_text('{"prompt": "hot?"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"v2\.jsonl, line 1: not an answer with its prompt"):
        data.read(tmp_path)
