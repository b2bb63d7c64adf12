"""The training stages: killed and gone on with, cut up among ranks, on data without a gold score; and what the engine derives."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config
from rlhf.config.training import Optimizer, PretrainedBase
from rlhf.data.sandbox import make_rows
from rlhf.engine.distributed import accumulation, micro_batches, share
from rlhf.engine.setup import learning_rate_factor, parameter_groups
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, write_lines
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.base import pin
from rlhf.stages.ppo import read_prompts
from rlhf.stages.reward import read_pairs

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINED = ("base", "sft", "reward", "ppo")

# stages one after the other in one process, a rank of a real process group; STAGE:killed dies by SIGKILL after its first checkpoint
PROGRAM = """
import os, shutil, signal, sys
from importlib import import_module
from pathlib import Path
import torch.distributed as dist
from rlhf import config
from rlhf.engine import checkpoints
from rlhf.job import Job

def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

save = checkpoints.save
for word in sys.argv[1:]:
    stage, _, killed = word.partition(":")
    if killed:
        checkpoints.save = save_and_die
    root, rank, ranks = Path.cwd(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = Job(stage, config.load(), root, root / "runs" / stage, "cpu", rank, ranks, rank)
    job.folder.mkdir(parents=True, exist_ok=True)
    import_module(f"rlhf.stages.{stage}").main(job)
    if dist.is_initialized():
        dist.barrier()
    if job.is_main:
        shutil.copytree(job.folder / "out", root, dirs_exist_ok=True)
"""


def start(root: Path, *stages: str, rank: int, ranks: int, port: int) -> subprocess.Popen[str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | quiet | {name: str(value) for name, value in place.items()}
    command = [sys.executable, "-c", PROGRAM, *stages]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(root: Path, *stages: str, code: int = 0, ranks: int = 1) -> str:
    """Run stages to their end on so many ranks; what rank 0 printed."""
    port = free_port()
    processes = [start(root, *stages, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * ranks, "\n".join(said)
    return said[0]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tiny_params() -> dict[str, Any]:
    """The sandbox's params on one file of pairs, with sizes and steps that take a second or two."""
    raw = yaml.safe_load((REPOSITORY / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "messages": "m", "question": "q", "answer": "a", "text": "t"}
    split = {"text": 3, "sft": 2, "reward": 2, "ppo": 2, "judge": 2, "heldout": 1}
    place = {"path": "data/raw/pairs.jsonl", "hub": None, "revision": None, "hub_split": None}
    raw["data"]["sources"] = [{"name": "mine", "format": "pairs", "columns": columns, "split": split, **place}]
    raw["base"] |= {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    raw["base"] |= {"epochs": 1, "batch_size": 8, "checkpoint_every": 2}
    raw["sft"] |= {"epochs": 1.0, "batch_size": 8, "checkpoint_every": 2}
    raw["reward"] |= {"epochs": 1.0, "batch_size": 8, "checkpoint_every": 2}
    raw["evaluate"]["judge"] |= {"epochs": 1.0, "checkpoint_every": 1000}
    raw["evaluate"] |= {"bootstrap_samples": 50, "shown": 2, "texts": 5}
    raw["ppo"] |= {"steps": 4, "rollout_batch_size": 8, "mini_batch_size": 4, "epochs": 2, "max_answer_tokens": 8, "mixture_batch_size": 2}
    raw["ppo"] |= {"critic_warmup_steps": 1, "checkpoint_every": 2, "max_approx_kl": 100.0}
    raw["ppo"]["kl"] |= {"controller": "adaptive", "target": 1.0, "horizon": 100}
    return raw


def set_params(root: Path, raw: dict[str, Any]) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params and raw pairs, in which stage prepare has run."""
    root = tmp_path_factory.mktemp("workspace")
    set_params(root, tiny_params())
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows("pairs", 240, 1, 0.0)]
    write_lines(root / "data/raw/pairs.jsonl", rows)
    run(root, "prepare")
    return root


@pytest.fixture(scope="module")
def unbroken(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages, run from beginning to end in one go."""
    root = tmp_path_factory.mktemp("unbroken") / "root"
    shutil.copytree(workspace, root)
    run(root, *TRAINED, "evaluate")
    return root


# -------------------------------------------------------------------------------------------------------- the stages, whole


def test_a_stage_killed_after_a_checkpoint_goes_on_to_the_same_bytes(unbroken: Path, workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(workspace, root)
    for before, killed in zip((None, *TRAINED), (*TRAINED, None), strict=True):
        words = [*([before] if before else []), *([f"{killed}:killed"] if killed else [])]
        said = run(root, *words, code=-signal.SIGKILL if killed else 0)
        assert not before or f"{before}: goes on from step 2" in said
        if killed:
            assert [path.parent.name for path in root.glob(f"runs/{killed}/checkpoints/*/COMPLETE")] == ["step-2"]
            assert not (root / "models" / killed).exists()
    outputs = [f"models/{name}/model.safetensors" for name in TRAINED] + ["models/reward/config.json", "data/rollouts.jsonl"]
    outputs += [f"{kind}/{name}.{ending}" for name in TRAINED for kind, ending in (("metrics", "json"), ("plots", "csv"))]
    assert [path for path in outputs if (root / path).read_bytes() != (unbroken / path).read_bytes()] == []
    # the KL coefficient moved, so that going on with the first value would have shown
    assert len({row["beta"] for row in table(root / "plots/ppo.csv")}) > 2


def test_two_ranks_in_small_pieces_compute_what_one_does_at_once(unbroken: Path, tmp_path: Path) -> None:
    raw = tiny_params()
    raw["ppo"]["steps"] = 3
    found = {}
    for ranks, micro_batch_size in ((1, 32), (2, 3)):
        root = found[ranks] = tmp_path / str(ranks)
        shutil.copytree(unbroken, root, ignore=shutil.ignore_patterns("runs"))
        for layout in raw["launch"]["jobs"].values():
            layout |= {"processes": ranks, "micro_batch_size": micro_batch_size}
        set_params(root, raw)
        run(root, "ppo", "reward", "sft", ranks=ranks)
    one, two = found[1], found[2]
    for name in ("sft", "reward", "ppo"):
        rows = [table(root / f"plots/{name}.csv") for root in (one, two)]
        assert len(rows[0]) == len(rows[1]) >= 3
        for expected, row in zip(*rows, strict=True):
            for key, value in expected.items():
                # ratio_error is rounding and nothing else
                if value and key != "ratio_error":
                    assert float(row[key]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), (name, row["step"], key)
    answers = [[(row["step"], row["prompt"], row["answer"]) for row in read_lines(root / "data/rollouts.jsonl")] for root in (one, two)]
    assert len(answers[0]) == 3 * 8
    assert answers[0] == answers[1]


def test_data_without_a_gold_score_is_judged_by_a_second_reward_model(unbroken: Path) -> None:
    found = json.loads((unbroken / "metrics/evaluate.json").read_text(encoding="utf-8"))
    judged = len(read_lines(unbroken / "data/prepared/judge.jsonl"))
    assert judged > 0
    assert found["gold"] is None
    assert found["win_rate"]["judge"] == f"second reward model, trained on {judged} held-out pairs"
    assert found["win_rate"]["ci95"][0] <= found["win_rate"]["value"] <= found["win_rate"]["ci95"][1]
    assert found["prompts"] == len(read_lines(unbroken / "data/prepared/heldout_prompts.jsonl"))
    course = table(unbroken / "plots/gold_against_kl.csv")
    assert [row["step"] for row in course] == ["1", "2", "3", "4"]


def test_ppo_starts_at_the_policy_that_it_keeps_near(unbroken: Path) -> None:
    steps = [{name: float(value or 0) for name, value in row.items()} for row in table(unbroken / "plots/ppo.csv")]
    # while only the critic learns, the policy is sft itself
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["policy_loss"] == 0
    assert abs(steps[-1]["kl"]) > 1e-3
    assert all(step["ratio_error"] < 1e-4 for step in steps)
    records = read_lines(unbroken / "data/rollouts.jsonl")
    assert [record["step"] for record in records] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    for number, step in enumerate(steps):
        mean = sum(record["kl"] for record in records[8 * number : 8 * number + 8]) / 8
        assert mean == pytest.approx(step["kl"], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- the given model


def test_a_given_model_is_pinned_with_what_later_stages_need(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given | {"pad_token": None}))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|user|>{% endfor %}")

    def pinned(**changes: Any) -> PretrainedBase:
        values = {"source": "pretrained", "model": str(tmp_path), "revision": None, "trust_remote_code": False, "chat_template": "keep"}
        return PretrainedBase.model_validate(values | changes)

    model, kept = pin(pinned())
    # this template ends a turn with another token than the end of text
    assert kept.eos_token == kept.pad_token == "<|user|>"
    assert (model.config.eos_token_id, model.config.pad_token_id) == (kept.eos_token_id, kept.pad_token_id)
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], llama.state_dict()["model.embed_tokens.weight"])
    _, plain = pin(pinned(chat_template="turns"))
    assert plain.eos_token == "<|end|>"
    asked = [{"role": "user", "content": "Hi"}]
    assert plain.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "Human: Hi\n\nAssistant:"

    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"its tokenizer has no chat template .*base\.chat_template: turns"):
        pin(pinned())
    with pytest.raises(UserError, match=r"base\.model '.*nowhere' .*give a folder with config\.json"):
        pin(pinned(model=str(tmp_path / "nowhere")))


# ------------------------------------------------------------------------------------------------- what the engine derives


def optimizer(**changes: Any) -> Optimizer:
    values = {"learning_rate": 1.0, "schedule": "linear", "final_ratio": 0.2, "warmup_ratio": 0.2, "betas": [0.9, 0.95]}
    return Optimizer.model_validate(values | {"epsilon": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0} | changes)


def test_the_learning_rate_rises_and_falls() -> None:
    def course(**changes: Any) -> list[float]:
        return [learning_rate_factor(optimizer(**changes), step, 10) for step in range(11)]

    # two steps of warm-up, then eight down to a fifth
    assert course() == pytest.approx([1 / 3, 2 / 3, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert course(schedule="constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 9)
    cosine = course(schedule="cosine")
    assert (cosine[2], cosine[6], cosine[10]) == pytest.approx((1.0, 0.6, 0.2))
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert cosine[4] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + 2**-0.5))
    assert course(warmup_ratio=0.0)[0] == 1.0
    assert learning_rate_factor(optimizer(warmup_ratio=1.0), 1, 1) == pytest.approx(1.0)


def test_weight_decay_is_for_matrices_only(llama: LlamaForCausalLM) -> None:
    llama.model.norm.weight.requires_grad_(False)
    decayed, kept = parameter_groups(llama, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(llama.parameters())) - 1


def test_a_batch_is_dealt_evenly_to_ranks_and_cut_into_micro_batches(tmp_path: Path) -> None:
    raw = tiny_params()
    raw["launch"]["jobs"]["sft"]["micro_batch_size"] = 2
    jobs = [Job("sft", config.validate(raw, "params.yaml"), tmp_path, tmp_path, "cpu", rank, 2, rank) for rank in range(2)]
    assert [share(list("abcdef"), job, "sft.batch_size") for job in jobs] == [["a", "c", "e"], ["b", "d", "f"]]
    assert micro_batches(["a", "c", "e"], 2) == [["a", "c"], ["e"]]
    assert accumulation(6, jobs[0]) == 2
    assert accumulation(8, replace(jobs[0], world_size=1)) == 4
    with pytest.raises(UserError, match=r"sft\.batch_size: a batch of 5 rows cannot be dealt evenly to 2 processes .*multiple of 2"):
        share(list("abcde"), jobs[0], "sft.batch_size")


def test_rows_that_are_all_too_long_are_an_error(unbroken: Path, tmp_path: Path) -> None:
    raw = tiny_params()
    raw["ppo"]["max_prompt_tokens"] = raw["sft"]["max_tokens"] = 5
    job = Job("reward", config.validate(raw, "params.yaml"), unbroken, tmp_path, "cpu", 0, 1, 0)
    tokenizer = load_tokenizer(unbroken / "models/base")
    with pytest.raises(UserError, match=r"reward\.jsonl: none of \d+ pairs fits in 5 tokens .*raise reward's max_tokens"):
        read_pairs(job, tokenizer, "data/prepared/reward.jsonl", 5)
    with pytest.raises(UserError, match=r"ppo\.max_prompt_tokens: none of \d+ prompts fits in 5 tokens"):
        read_prompts(job, tokenizer)
    root = tmp_path / "root"
    shutil.copytree(unbroken, root, ignore=shutil.ignore_patterns("runs"))
    set_params(root, raw)
    assert "UserError: sft.max_tokens: none of" in run(root, "sft", code=1)


def test_too_long_rows_are_left_out_and_counted(unbroken: Path, tmp_path: Path) -> None:
    job = Job("reward", config.validate(tiny_params(), "params.yaml"), unbroken, tmp_path, "cpu", 0, 1, 0)
    tokenizer = load_tokenizer(unbroken / "models/base")
    every, none = read_pairs(job, tokenizer, "data/prepared/reward.jsonl", 1000)
    limit = sorted(max(map(len, pair)) for pair in every)[len(every) // 2]
    kept, left_out = read_pairs(job, tokenizer, "data/prepared/reward.jsonl", limit)
    assert none == 0
    assert kept == [pair for pair in every if max(map(len, pair)) <= limit]
    assert left_out == len(every) - len(kept) > 0
