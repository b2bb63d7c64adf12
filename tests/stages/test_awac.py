"""Stage awac on tiny models: what it learns from, what it leaves out, kills; and the stage that follows starts from it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rlhf import config
from rlhf.data import earlier
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, write_lines
from rlhf.models.tokenizer import load_tokenizer
from rlhf.plan import memory
from rlhf.stages.awac import read_answers
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params
from tests.stages.test_sharding import make_models

LORA = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "learning_rate": 1e-2}


def params_of(**changes: Any) -> dict[str, Any]:
    raw = tiny_params()
    raw["awac"] |= {"versions": 1, "epochs": 1.0, "batch_size": 8, "checkpoint_every": 2} | changes
    raw["ppo"] |= {"steps": 1, "critic_warmup_steps": 0}
    raw["rewards"] = [{"name": "model", "kind": "model", "weight": 1.0}]
    return raw


def lines_of(root: Path, answers: int = 2) -> list[dict[str, Any]]:
    """So many answers to each prompt of the training slice, the first of which are cut off, and two to one that is held out."""
    prompts = [row["prompt"] for row in read_lines(root / "data/prepared/ppo.jsonl")[:16]]
    lines = [{"prompt": prompt, "answer": f"It is {number} of {place}.", "ended": True} for place, prompt in enumerate(prompts)
             for number in range(answers)]  # fmt: skip
    held_out = read_lines(root / "data/prepared/heldout_prompts.jsonl")[0]["prompt"]
    # the first prompt is left with one answer
    lines[0] |= {"ended": False}
    return lines + [{"prompt": held_out, "answer": word} for word in ("One.", "Two.")]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    root = tmp_path_factory.mktemp("awac") / "start"
    make_workspace(root, params_of(), pairs=120)
    make_models(root, tokenizer)
    write_lines(root / earlier.FOLDER / "v1.jsonl", lines_of(root))
    return root


def place(start: Path, root: Path, raw: dict[str, Any]) -> Path:
    shutil.copytree(start, root)
    set_params(root, raw)
    return root


def job_of(root: Path) -> Job:
    return Job("awac", config.load(root / "params.yaml"), root, root / "runs/awac", "cpu", 0, 1, 0)


def test_what_is_held_out_cut_off_too_long_or_alone_is_left_out_and_counted(start: Path, tmp_path: Path) -> None:
    answers, left_out = read_answers(job_of(start), load_tokenizer(start / "models/sft"))
    assert left_out == {"held_out": 2, "cut_off": 1, "too_long": 0, "alone": 1}
    assert [answer.prompt for answer in answers] == [number for number in range(15) for _ in range(2)]
    held_out = {json.dumps(row["prompt"]) for row in read_lines(start / "data/prepared/heldout_prompts.jsonl")}
    assert not any(json.dumps(answer.line["prompt"]) in held_out for answer in answers)
    root = place(start, tmp_path / "root", params_of(max_tokens=2))
    with pytest.raises(UserError, match=r"no two are to one prompt that may be trained on \(2 held out, 1 cut off, 31 too long, 0 alone"):
        read_answers(job_of(root), load_tokenizer(root / "models/sft"))


def test_a_killed_stage_goes_on_to_the_same_bytes_and_the_policy_starts_there(start: Path, tmp_path: Path) -> None:
    roots = [place(start, tmp_path / name, params_of()) for name in ("root", "unbroken")]
    run(roots[0], "awac:killed", code=-signal.SIGKILL)
    said = run(tmp_path, "root/awac", "unbroken/awac", "unbroken/ppo")
    assert "awac: goes on from step 2" in said
    for path in ("models/awac/model.safetensors", "metrics/awac.json", "plots/awac.csv"):
        assert (roots[0] / path).read_bytes() == (roots[1] / path).read_bytes()
    rows = table(roots[1] / "plots/awac.csv")
    assert len(rows) == 4  # of 8 of the 30 answers
    assert all(1 <= float(row["effective_sample_size"]) <= 8 for row in rows)
    first = table(roots[1] / "plots/ppo.csv")[0]
    # the policy that answers is awac's, and the KL is to sft
    assert float(first["ratio_error"]) < 1e-4
    assert float(first["kl"]) > 1e-3


def test_with_adapters_the_kl_is_still_to_sft(start: Path, tmp_path: Path) -> None:
    raw = params_of(lora=LORA)
    raw["ppo"]["actor_lora"] = LORA
    root = place(start, tmp_path / "root", raw)
    run(root, "awac", "ppo")
    assert float(table(root / "plots/ppo.csv")[0]["kl"]) > 1e-3
    weights = [load_file(root / f"models/{name}/model.safetensors") for name in ("sft", "awac")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # the second model is accounted for
    params = config.load(root / "params.yaml")
    assert [held.engine for held in memory.models("ppo", params)] == ["policy", "critic", "reference", "reward"]
