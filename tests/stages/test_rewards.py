"""Rewards of several kinds in a stage that learns from its own answers: real stages on tiny models, real processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import config
from rlhf.job import Job, read_lines
from rlhf.models.scalar import load_scalar
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import ppo, reward
from rlhf.stages.rewarding import Rewards
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params

FUNCTIONS = """
import time

def letters(answer):
    return len(answer)

def sometimes(answer):
    if len(answer) % 2:
        raise LookupError("an odd answer")
    return 1

def never(answer):
    raise LookupError("no answer will do")
"""
MODEL = {"name": "model", "kind": "model", "weight": 1.0}


def function(name: str, weight: float, **changes: Any) -> dict[str, Any]:
    entry = {"name": name, "kind": "function", "weight": weight, "function": f"my.py:{name}", "options": {}, "sources": None}
    return entry | {"right_from": None, "seconds": 20.0, "failure_score": -1.0, "max_failed_share": 1.0} | changes


def with_rewards(*entries: dict[str, Any]) -> dict[str, Any]:
    raw = tiny_params()
    raw["rewards"] = [MODEL, *entries]
    raw["ppo"] |= {"reward_clip": 100.0, "stop": {"kl": 1000.0, "score": 1000.0}}
    return raw


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all before ppo has run."""
    root = tmp_path_factory.mktemp("rewards") / "root"
    make_workspace(root, with_rewards(), pairs=240)
    (root / "my.py").write_text(FUNCTIONS, encoding="utf-8")
    run(root, "base", "sft", "reward")
    return root


def copy_of(workspace: Path, folder: Path, *entries: dict[str, Any]) -> Path:
    root = folder / "root"
    shutil.copytree(workspace, root)
    set_params(root, with_rewards(*entries))
    return root


def test_the_sum_is_trained_on_and_each_reward_is_logged(workspace: Path, tmp_path: Path) -> None:
    root = copy_of(workspace, tmp_path, function("letters", 0.5), function("sometimes", 0.0))
    said = run(root, "ppo")
    assert said.count("LookupError: an odd answer") == 1  # its first traceback alone
    assert "reward 'sometimes' failed for the first time, in step 1" in said
    rollouts = read_lines(root / "data/rollouts.jsonl")
    for row in rollouts:
        given = row["rewards"]
        assert given["letters"] == len(row["answer"])
        assert given["sometimes"] == (-1 if len(row["answer"]) % 2 else 1)
        assert row["score"] == pytest.approx(given["model"] + 0.5 * given["letters"], rel=1e-6)
    course = table(root / "plots/ppo.csv")
    first = [row["rewards"]["letters"] for row in rollouts if row["step"] == 1]
    assert float(course[0]["reward/letters"]) == pytest.approx(sum(first) / len(first))
    assert float(course[0]["reward/sometimes_failed"]) > 0
    assert {f"reward/letters{what}" for what in ("", "_std", "_zero", "_failed")} <= course[0].keys()
    # seconds are no output, and go to the log alone
    logged = read_lines(root / "runs/ppo/metrics.jsonl")[0]["metrics"]
    assert logged["reward/letters_seconds"] > 0
    assert not any("seconds" in name for name in json.loads((root / "metrics/ppo.json").read_text(encoding="utf-8")))


def test_ranks_and_a_kill_change_nothing(workspace: Path, tmp_path: Path) -> None:
    entries = (function("letters", 0.5), function("sometimes", 1.0))
    whole, killed, shared = (copy_of(workspace, tmp_path / name, *entries) for name in ("whole", "killed", "shared"))
    run(whole, "ppo")
    run(killed, "ppo:killed", code=-signal.SIGKILL)
    assert "ppo: goes on from step 2" in run(killed, "ppo")
    for path in ("models/ppo/model.safetensors", "data/rollouts.jsonl", "metrics/ppo.json", "plots/ppo.csv"):
        assert (killed / path).read_bytes() == (whole / path).read_bytes()
    run(shared, "ppo", ranks=2)
    first = [[row for row in read_lines(root / "data/rollouts.jsonl") if row["step"] == 1] for root in (whole, shared)]
    assert [row["rewards"]["letters"] for row in first[0]] == [row["rewards"]["letters"] for row in first[1]]


def test_a_reward_that_fails_on_too_many_answers_ends_the_stage(workspace: Path, tmp_path: Path) -> None:
    root = copy_of(workspace, tmp_path, function("never", 1.0, max_failed_share=0.5))
    said = run(root, "ppo", code=1)
    assert "reward 'never' (my.py:never) failed on 8 of 8 answers, more than max_failed_share (0.5) allows" in said
    assert said.count("LookupError: no answer will do") >= 1
    assert not (root / "models/ppo").exists()


def test_an_answer_that_was_cut_off_is_judged_as_if_it_had_ended_there(workspace: Path, tmp_path: Path) -> None:
    raw = with_rewards()
    own = {"steps": 1, "max_answer_tokens": 6, "rollout_batch_size": 32, "missing_eos_penalty": 0.5, "no_eos_reward": None}
    raw["ppo"] |= own
    root = copy_of(workspace, tmp_path)
    set_params(root, raw)
    assert "it pays not to end" not in run(root, "ppo")
    rows = read_lines(root / "data/rollouts.jsonl")
    assert {row["ended"] for row in rows} == {True, False}

    tokenizer = load_tokenizer(root / "models/reward")
    model = load_scalar(root / "models/reward", tokenizer, "fp32")
    prompts = torch.load(root / "runs/ppo/rollout.pt", weights_only=True)["prompts"]
    whole = [prompt["ids"] + ids + ([] if ended else [tokenizer.eos_token_id]) for prompt in prompts for ids, ended, _ in prompt["answers"]]
    judged = [(score - model.mean) / model.std for score in reward.score(model, whole, 4096)]
    assert [row["score"] for row in rows] == pytest.approx(judged, abs=1e-5)
    rewards = [row["score"] - 0.5 * (not row["ended"]) for row in rows]
    assert float(table(root / "plots/ppo.csv")[0]["reward"]) == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)


def test_the_critic_begins_with_the_normalised_scores(workspace: Path) -> None:
    tokenizer = load_tokenizer(workspace / "models/reward")
    model, critic = (load_scalar(workspace / "models/reward", tokenizer, "fp32") for _ in range(2))
    ppo.begin_as(critic, model)
    assert abs(model.mean / model.std) > 0.1
    ids = torch.tensor([tokenizer.encode("What is the opposite of hot?")])
    with torch.no_grad():
        assert critic(input_ids=ids).tolist() == pytest.approx(((model(input_ids=ids) - model.mean) / model.std).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "section", "fixed", "remedy"),
    [
        ("ppo", "ppo", 50.0, "lower ppo.no_eos_reward"),
        ("grpo", "grpo", None, "raise grpo.missing_eos_penalty"),
        ("iterative", "answers", -1.0, "lower answers.no_eos_reward"),
    ],
)
def test_it_is_told_once_that_not_to_end_pays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, section: str, fixed: float | None, remedy: str
) -> None:
    raw = with_rewards() | {"algorithm": stage}
    raw[section]["no_eos_reward"] = fixed
    job = Job(stage, config.validate(raw, "params.yaml"), tmp_path, tmp_path, "cpu", 0, 1, 0)
    rewards = Rewards.of(job)
    rewards.check(job, 1, [], [1.0, 1.0], [True, False])
    rewards.check(job, 2, [], [1.0, 2.0], [True, True])
    rewards.check(job, 3, [], [1.0, 2.0, 3.0], [True, False, True])
    rewards.check(job, 4, [], [*[1.0] * 11, 9.0], [*[True] * 11, False])  # one of twelve
    rewards.check(job, 5, [], [1.0, 0.0, 9.0, 9.0], [True, False, False, False], 2)  # against those of its own group it is worse
    assert "pays" not in capsys.readouterr().out
    for step in (6, 7):
        rewards.check(job, step, [], [1.0, 2.5, 1.5, 5.0, 5.5, 5.0], [True, False, True, True, False, True], 2)
    said = capsys.readouterr().out
    assert said.count("pays") == 1
    assert "step 6: answers that are cut off have a reward that is 0.875 higher on the average than that of answers that end" in said
    assert f"so that it pays not to end; {remedy}\n" in said


def test_it_is_told_once_that_many_rewards_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = with_rewards()
    raw["ppo"]["reward_clip"] = 5.0
    job = Job("ppo", config.validate(raw, "params.yaml"), tmp_path, tmp_path, "cpu", 0, 1, 0)
    rewards = Rewards.of(job)
    rewards.check(job, 1, [], [4.9, -5.0], [True, False])  # what an answer that was cut off gets is not cut
    assert capsys.readouterr().out == ""
    for step in (2, 3):
        rewards.check(job, step, [], [5.0, -5.0, 1.0, 2.0], [True] * 4)
    assert capsys.readouterr().out == "ppo: step 2: 50% of the rewards are cut at ±5; raise ppo.reward_clip\n"
