"""Training from the stored answers of a step alone, and a reward function that is edited in the middle of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rlhf import config
from rlhf.errors import UserError
from rlhf.job import Job, read_lines
from rlhf.launcher.launch import launch
from rlhf.launcher.replay import replay
from rlhf.stages import stored
from rlhf.workspace import dag, presets
from tests.stage_runs import REPOSITORY, make_workspace, run, tiny_params
from tests.stages.test_rewards import function

# edited by itself, once in a run, as a user would in the middle of it
FUNCTIONS = """
from pathlib import Path

def letters(answer):
    return len(answer)
"""
EDITING = """
    if Path("edit").exists():
        Path("edit").unlink()
        Path(__file__).write_text(Path(__file__).read_text().replace("return len(answer)", "return -1000.0"))
        raise SystemExit  # a fresh process reads it anew
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which grpo has run, by the rewards of a model and of a function."""
    root = tmp_path_factory.mktemp("stored") / "root"
    raw = tiny_params() | {"algorithm": "grpo"}
    raw["rewards"].append(function("letters", 0.1))
    raw["grpo"] |= {"steps": 3, "rollout_batch_size": 8, "mini_batch_size": 4, "answers_per_prompt": 4, "max_answer_tokens": 8}
    raw["grpo"] |= {"mixture_batch_size": 2, "max_approx_kl": 100.0, "checkpoint_every": 2}
    raw["launch"]["accelerator"] = "cpu"
    make_workspace(root, raw, pairs=240)
    shutil.copytree(REPOSITORY / "graphs", root / "graphs")
    (root / "dvc.yaml").write_text(dag.text(root, config.load(root / "params.yaml")), encoding="utf-8")
    (root / "rlhf").symlink_to(REPOSITORY / "rlhf")
    (root / "my.py").write_text(FUNCTIONS, encoding="utf-8")
    run(root, "base", "sft", "reward", "grpo")
    return root


def copy_of(root: Path, place: Path) -> Path:
    """The workspace as the launcher takes it: an input outside of it is refused."""
    shutil.copytree(root, place, symlinks=True)
    (place / "rlhf").unlink()
    shutil.copytree(REPOSITORY / "rlhf", place / "rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    return place


def test_the_last_steps_answers_are_kept(root: Path) -> None:
    content = torch.load(root / "runs/grpo" / stored.FILE, weights_only=True)
    assert (content["stage"], content["step"], len(content["prompts"])) == ("grpo", 3, 2)
    last = [row["answer"] for row in read_lines(root / "data/rollouts.jsonl") if row["step"] == 3]
    assert [len(prompt["answers"]) for prompt in content["prompts"]] == [4, 4]
    assert len(last) == 8


def test_a_stored_step_is_trained_from_without_sampling(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = copy_of(root, tmp_path / "place")
    before = (place / "models/grpo/model.safetensors").read_bytes()
    rollouts = place / "runs/grpo" / stored.FILE
    assert replay("grpo", place, rollouts) == 0
    steps = [line["metrics"] for line in read_lines(place / "runs/replay/grpo/metrics.jsonl")]
    assert len(steps) == 3
    assert len({step["answer_tokens"] for step in steps}) == 1  # the same answers in each step
    assert steps[0]["ratio_error"] < 1e-3  # of the policy as it stands, whoever sampled them
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert (place / "models/grpo/model.safetensors").read_bytes() == before
    assert not (place / "runs/replay/grpo/out").exists()
    assert rollouts.is_file()


def test_what_cannot_be_trained_from_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage sft learns from no answers of its own"):
        replay("sft", root, tmp_path / "x")
    with pytest.raises(UserError, match="no such file"):
        replay("grpo", root, tmp_path / "x")
    (tmp_path / "x").write_text("x", encoding="utf-8")
    job = Job("ppo", config.load(root / "params.yaml"), root, tmp_path, "cpu", 0, 1, 0)
    with pytest.raises(UserError, match="holds no stored answers"):
        stored.load(job, tmp_path / "x")
    whole = torch.load(root / "runs/grpo" / stored.FILE, weights_only=True)
    (prompt, *_) = whole["prompts"]
    ids, ended, log_probs = prompt["answers"][0]
    for damaged in ([], [7], [prompt | {"answers": []}], [prompt | {"answers": [[ids, ended, log_probs[1:]]]}], [prompt | {"row": {}}]):
        torch.save(whole | {"prompts": damaged}, tmp_path / "x")
        with pytest.raises(UserError, match="holds no stored answers"):
            stored.load(job, tmp_path / "x")
    with pytest.raises(UserError, match="holds answers of stage grpo, not of ppo"):
        stored.load(job, root / "runs/grpo" / stored.FILE)


def test_an_edit_of_a_reward_function_in_the_middle_of_a_run_is_told_and_nothing_is_lost(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = copy_of(root, tmp_path / "place")
    own = FUNCTIONS.replace("(answer):\n", f"(answer):{EDITING}")
    (place / "my.py").write_text(own, encoding="utf-8")
    (place / "edit").touch()
    shutil.rmtree(place / "runs")
    before = (place / "models/grpo/model.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"my.py was edited while stage grpo ran, which went on by what it was: nothing was published"
    ) as told:
        launch("grpo", place)
    assert "copy back what it was, from " in told.value.remedy
    assert "grpo: my.py was edited: this run goes on by what it was" in capfd.readouterr().out
    assert (place / "models/grpo/model.safetensors").read_bytes() == before
    assert "return -1000.0" in (place / "my.py").read_text(encoding="utf-8")
    # put back, what was trained is published without another step
    kept = next((place / "runs/grpo").glob("*/functions/my.py"))
    assert kept.read_text(encoding="utf-8") == own
    shutil.copyfile(kept, place / "my.py")
    assert launch("grpo", place) == 0
    assert "grpo 1/3" not in capfd.readouterr().out
    rows = read_lines(place / "data/rollouts.jsonl")
    assert [row["rewards"]["letters"] for row in rows].count(-1.0) == 1  # of the call that edited it
    assert all(row["rewards"]["letters"] in (len(row["answer"]), -1.0) for row in rows)


def test_ppo_is_trained_from_a_stored_step(root: Path, tmp_path: Path) -> None:
    place = copy_of(root, tmp_path / "place")
    presets.use(place, str(place / "params.yaml"), ["algorithm=ppo", "ppo.steps=3"])
    run(place, "ppo")
    rollouts = place / "runs/ppo" / stored.FILE
    published = (place / "models/ppo/model.safetensors").read_bytes()
    assert replay("ppo", place, rollouts) == 0
    steps = [line["metrics"] for line in read_lines(place / "runs/replay/ppo/metrics.jsonl")]
    assert len(steps) == 3
    assert len({step["answer_tokens"] for step in steps}) == 1
    assert steps[0]["ratio_error"] < 1e-3
    assert (place / "models/ppo/model.safetensors").read_bytes() == published
    assert not (place / "runs/replay/ppo/out").exists()
