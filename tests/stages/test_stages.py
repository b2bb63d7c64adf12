"""The training stages: killed and gone on with, cut up among ranks, on data without a gold score; and what the engine derives."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config
from rlhf.config.training import Optimizer
from rlhf.engine.distributed import micro_batches, share, share_tokens
from rlhf.engine.setup import learning_rate_factor, move_schedule, parameter_groups
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, write_lines
from rlhf.models.dialogues import encode_prompt
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.answering import read_prompts
from rlhf.stages.reward import read_pairs
from rlhf.stages.sft import read_rows
from tests.stage_runs import TRAINED, make_workspace, run, set_params, table, tiny_params


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params and raw pairs, in which stage prepare has run."""
    root = tmp_path_factory.mktemp("workspace")
    make_workspace(root, tiny_params(), pairs=240)
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
            assert [path.parent.name for path in root.glob(f"runs/{killed}/checkpoints/*/COMPLETE-0")] == ["step-2"]
            assert not (root / "models" / killed).exists()
    outputs = [f"models/{name}/model.safetensors" for name in TRAINED] + ["models/reward/config.json", "data/rollouts.jsonl"]
    outputs += [f"{kind}/{name}.{ending}" for name in TRAINED for kind, ending in (("metrics", "json"), ("plots", "csv"))]
    assert [path for path in outputs if (root / path).read_bytes() != (unbroken / path).read_bytes()] == []
    # the KL coefficient moved, so that going on with the first value would have shown
    assert len({row["beta"] for row in table(root / "plots/ppo.csv")}) > 2


def test_the_held_out_accuracy_of_reward_is_followed_and_changes_nothing(unbroken: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(unbroken, root)
    shutil.rmtree(root / "runs/reward")
    run(root, "reward:unmeasured")
    weights = "models/reward/model.safetensors"
    assert (root / weights).read_bytes() == (unbroken / weights).read_bytes()
    steps = table(unbroken / "plots/reward.csv")
    measured = {int(row["step"]): float(row["heldout_accuracy"]) for row in steps if row["heldout_accuracy"]}
    assert list(measured) == sorted({len(steps) * point // 8 for point in range(1, 9)} - {0})
    found = json.loads((unbroken / "metrics/reward.json").read_text(encoding="utf-8"))
    # the tiny workspace has fewer held-out pairs than are measured on: the curve ends at the stage's own number
    assert measured[len(steps)] == found["heldout_accuracy"]
    assert table(root / "plots/reward.csv") == [{name: value for name, value in row.items() if name != "heldout_accuracy"} for row in steps]
    logged = {line["step"] for line in read_lines(unbroken / "runs/reward/metrics.jsonl") if "heldout_accuracy" in line["metrics"]}
    assert logged == set(measured)


def test_data_without_a_gold_score_is_judged_by_a_second_reward_model(unbroken: Path) -> None:
    found = json.loads((unbroken / "metrics/evaluate.json").read_text(encoding="utf-8"))
    judged = len(read_lines(unbroken / "data/prepared/judge.jsonl"))
    assert judged > 0
    assert found["gold"] is None
    assert found["win_rate"]["judge"] == f"second reward model, trained on {judged} held-out pairs"
    assert found["win_rate"]["ci95"][0] <= found["win_rate"]["value"] <= found["win_rate"]["ci95"][1]
    assert found["prompts"] == len(read_lines(unbroken / "data/prepared/heldout_prompts.jsonl"))
    # what dvc lists: the numbers that decide, without a gold score here
    short = json.loads((unbroken / "metrics/summary.json").read_text(encoding="utf-8"))
    assert (short["win_rate_low"], short["kl"]) == (found["win_rate"]["ci95"][0], found["kl"])
    assert (short["eos_rate"], short["reward_accuracy"]) == (found["eos_rate"]["ppo"], found["reward_model"]["accuracy"])
    assert len(short) == 11
    assert short["win_rate_length_controlled"] == found["win_rate"]["length_controlled"]["value"]
    # how sure the reward model is of held-out pairs, and how often right
    low, high = found["reward_model"]["accuracy_ci95"]
    assert low <= found["reward_model"]["accuracy"] <= high
    calibrated = found["reward_model"]["calibration"]
    assert sum(row["n"] for row in calibrated["pairs"].values()) == found["reward_model"]["n"]
    assert short["reward_calibration_error"] == calibrated["error"]
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


def test_ppo_logs_what_each_step_cost_and_keeps_it_out_of_its_outputs(unbroken: Path) -> None:
    lines = read_lines(unbroken / "runs/ppo/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    phases = ("switching", "generation", "scoring", "training")
    for found in (line["metrics"] for line in lines):
        assert sum(found[f"{phase}_share"] for phase in phases) == pytest.approx(1)
        assert sum(found[f"{phase}_seconds"] for phase in phases) == pytest.approx(found["seconds"])
        answers = found["generation_tokens_per_second"] * found["generation_seconds"]
        assert answers == pytest.approx(8 * found["answer_tokens"])
        # each answer is learnt from twice, with its prompt; the actor's warm-up step has no texts beside them
        assert found["training_tokens_per_second"] * found["training_seconds"] > 2 * answers
        assert found["scoring_tokens_per_second"] * found["scoring_seconds"] > answers
        assert 0 < found["flops_utilisation"] < 1
        assert found["peak_memory_gib"] > 0.1
    wall_clock = ("second", "share", "utilisation", "memory")
    for names in (table(unbroken / "plots/ppo.csv")[0], json.loads((unbroken / "metrics/ppo.json").read_text(encoding="utf-8"))):
        assert [name for name in names if any(part in name for part in wall_clock)] == []


def test_a_champion_is_judged_as_evaluate_judged(unbroken: Path, tmp_path: Path) -> None:
    """The first-tuned model in the part of the champion: its answers, scores and rewards must come out as evaluate had them."""
    for name, same in (("anew", False), ("again", True)):
        shutil.copytree(unbroken, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
        (tmp_path / name / "runs/compare").mkdir(parents=True)
        champion = {"folder": str(unbroken / "models/sft"), "algorithm": "sft", "same_evaluation": same}
        (tmp_path / name / "runs/compare/champion.json").write_text(json.dumps(champion), encoding="utf-8")
    shutil.copy(unbroken / "data/answers.jsonl", unbroken / "models/evaluation.jsonl")
    shutil.rmtree(tmp_path / "again/models/judge")  # the known answers are not judged once more
    run(tmp_path, "anew/compare", "again/compare")
    evaluated = read_lines(unbroken / "data/answers.jsonl")
    anew, again = (read_lines(tmp_path / name / "comparison.jsonl") for name in ("anew", "again"))
    assert len(anew) == len(evaluated) > 0
    for before, after in zip(evaluated, anew, strict=True):
        assert (after["prompt"], after["kind"]) == (before["prompt"], None)
        assert after["answers"] == {"new": before["answers"]["ppo"], "champion": before["answers"]["sft"]}
        assert after["scores"]["champion"] == pytest.approx(before["scores"]["sft"], abs=1e-5)
        assert after["rewards"]["champion"] == pytest.approx(before["rewards"]["sft"], abs=1e-5)
        assert (after["scores"]["new"], after["rewards"]["new"]) == (before["scores"]["ppo"], before["rewards"]["ppo"])
    assert [row["answers"] for row in again] == [row["answers"] for row in anew]
    judge = json.loads((unbroken / "models/judge/judge.json").read_text(encoding="utf-8"))
    assert judge["fingerprint"] == json.loads((unbroken / "metrics/evaluate.json").read_text(encoding="utf-8"))["judge"]


@pytest.mark.parametrize("tokens", [0, 1])
def test_prompts_that_a_champion_has_no_room_for_are_left_out(unbroken: Path, tmp_path: Path, tokens: int) -> None:
    root, small = tmp_path / "small", tmp_path / "champion"
    shutil.copytree(unbroken, root, ignore=shutil.ignore_patterns("runs"))
    shutil.copytree(unbroken / "models/sft", small)
    asked = read_lines(root / "data/answers.jsonl")
    tokenizer = load_tokenizer(small)
    # room for the shortest prompts and an answer, or for none
    lengths = [len(encode_prompt(tokenizer, row["prompt"])) for row in asked]
    room = min(lengths) - 1 + tokens
    settings = json.loads((small / "config.json").read_text(encoding="utf-8"))
    settings["max_position_embeddings"] = room + tiny_params()["ppo"]["max_answer_tokens"]
    (small / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (root / "runs/compare").mkdir(parents=True)
    champion = {"folder": str(small), "algorithm": "sft", "same_evaluation": False}
    (root / "runs/compare/champion.json").write_text(json.dumps(champion), encoding="utf-8")
    said = run(tmp_path, "small/compare")
    found = read_lines(root / "comparison.jsonl")
    short = [row["prompt"] for row, length in zip(asked, lengths, strict=True) if length <= room]
    assert [row["prompt"] for row in found] == short
    assert bool(short) == bool(tokens)
    assert f"{len(asked) - len(short)} of {len(asked)} prompts are left out" in said


@pytest.mark.parametrize("gather", ["whole", "layers"])
def test_ranks_that_share_models_out_evaluate_the_same(unbroken: Path, tmp_path: Path, gather: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(unbroken, root, ignore=shutil.ignore_patterns("runs", "judge"))
    raw = tiny_params()
    raw["launch"]["jobs"]["evaluate"]["processes"] = 2
    raw["launch"]["rollout"]["gather"] = gather
    for engine in raw["launch"]["engines"].values():
        engine["zero_stage"] = 3
    set_params(root, raw)
    assert run(root, "evaluate:partitioned", ranks=2).count("in parts") == 3  # sft, ppo and the reward model
    before, after = (read_lines(folder / "data/answers.jsonl") for folder in (unbroken, root))
    for row, other in zip(before, after, strict=True):
        assert (row["prompt"], row["answers"]) == (other["prompt"], other["answers"])
        assert [other[kind] for kind in ("scores", "rewards")] == [pytest.approx(row[kind], abs=1e-4) for kind in ("scores", "rewards")]
    found, expected = (json.loads((folder / "metrics/evaluate.json").read_text(encoding="utf-8")) for folder in (root, unbroken))
    assert found["kl"] == pytest.approx(expected["kl"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- the given model


def test_a_given_model_is_pinned_by_its_stage(
    workspace: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    root, folder = tmp_path / "root", tmp_path / "model"
    shutil.copytree(workspace, root)
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    raw = tiny_params()
    raw["base"] = {"source": "pretrained", "model": str(folder), "revision": None, "trust_remote_code": False, "chat_template": "keep"}
    set_params(root, raw)
    run(root, "base")
    assert (root / "models/base/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((root / "metrics/base.json").read_text())["parameters"] == llama.num_parameters()
    llama.model.norm.weight.data.fill_(math.nan)
    llama.save_pretrained(folder)
    assert f"base.model '{folder}' computes no numbers: its perplexity on held-out text is nan" in run(root, "base", code=1)


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


def test_a_schedule_can_be_moved_to_another_step_and_peak() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    stepped = torch.optim.AdamW([{"params": [weight]}], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, lambda step: learning_rate_factor(optimizer(), step, 10))
    engine: Any = SimpleNamespace(lr_scheduler=scheduler)
    move_schedule(engine, 4, 0.5)
    assert stepped.param_groups[0]["lr"] == pytest.approx(0.5 * 0.8)
    stepped.step()
    scheduler.step()
    assert stepped.param_groups[0]["lr"] == pytest.approx(0.5 * 0.7)


def test_weight_decay_is_for_matrices_only(llama: LlamaForCausalLM) -> None:
    llama.model.norm.weight.requires_grad_(False)
    decayed, kept = parameter_groups(llama, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(llama.parameters())) - 1


def test_a_batch_is_dealt_evenly_to_ranks(tmp_path: Path) -> None:
    jobs = [Job("sft", config.validate(tiny_params(), "params.yaml"), tmp_path, tmp_path, "cpu", rank, 2, rank) for rank in range(2)]
    assert [share(list("abcdef"), job, "sft.batch_size") for job in jobs] == [["a", "c", "e"], ["b", "d", "f"]]
    with pytest.raises(UserError, match=r"sft\.batch_size: a batch of 5 rows cannot be dealt evenly to 2 processes .*multiple of 2"):
        share(list("abcde"), jobs[0], "sft.batch_size")
    with pytest.raises(UserError, match=r"sft\.batch_size: a batch of 5 rows cannot be dealt evenly to 2 processes .*multiple of 2"):
        share_tokens(list("abcde"), len, jobs[0], "sft.batch_size")


def test_ranks_get_about_as_many_tokens_of_a_batch(tmp_path: Path) -> None:
    jobs = [Job("sft", config.validate(tiny_params(), "params.yaml"), tmp_path, tmp_path, "cpu", rank, 2, rank) for rank in range(2)]

    def dealt(*lengths: int) -> list[list[int]]:
        return [share_tokens(lengths, int, job, "sft.batch_size") for job in jobs]

    assert dealt(9, 1, 8, 2, 7, 3) == [[9, 2, 3], [1, 8, 7]]  # 14 and 16; every other row would be 24 and 6
    assert dealt(9, 1, 1, 1) == [[9, 1], [1, 1]]  # as many rows on each
    one = Job("sft", jobs[0].params, tmp_path, tmp_path, "cpu", 0, 1, 0)
    assert share_tokens(["aaa", "b", "cc"], len, one, "sft.batch_size") == ["aaa", "b", "cc"]


def test_answers_to_a_prompt_stay_on_one_rank_as_far_as_numbers_allow(tmp_path: Path) -> None:
    params = config.validate(tiny_params(), "params.yaml")

    def dealt(*rows: str) -> list[list[str]]:
        jobs = [Job("grpo", params, tmp_path, tmp_path, "cpu", rank, 2, rank) for rank in range(2)]
        return [share_tokens(rows, len, job, "grpo.mini_batch_size", together=lambda row: row[0]) for job in jobs]

    assert dealt("axxx", "axxx", "b", "b", "cx", "cx", "dxxx", "dxx") == [["axxx", "axxx", "b", "b"], ["cx", "cx", "dxxx", "dxx"]]
    assert dealt("a", "a", "a", "a") == [["a", "a"], ["a", "a"]]
    assert dealt("axx", "axx", "axx", "bx", "bx", "bx") == [["axx", "axx", "axx"], ["bx", "bx", "bx"]]
    assert dealt("a", "a", "a", "a", "b", "c") == [["a", "a", "a"], ["a", "b", "c"]]


def test_micro_batches_hold_about_as_many_tokens_and_none_too_many() -> None:
    rows = ["a" * length for length in (5, 9, 1, 4, 7, 2)]

    def cut(tokens: int, **least: int) -> list[list[int]]:
        return [[len(row) for row in part] for part in micro_batches(rows, len, tokens, **least)]

    assert cut(28) == [[5, 9, 1, 4, 7, 2]]
    assert cut(27) == cut(14) == [[9, 1, 4], [5, 7, 2]]
    assert cut(13) == [[9, 1], [7, 2], [5, 4]]
    # the longest goes alone, and the others with as many as it has
    assert cut(3) == [[9], [7], [5, 1], [4, 2]]
    assert cut(28, least=3) == cut(13)
    assert cut(1, least=6) == [[9], [7], [5], [4], [2], [1]]
    assert micro_batches([], len, 10) == []


def test_rows_that_are_all_too_long_are_an_error(unbroken: Path, tmp_path: Path) -> None:
    raw = tiny_params()
    raw["ppo"]["max_prompt_tokens"] = raw["sft"]["max_tokens"] = 5
    job = Job("reward", config.validate(raw, "params.yaml"), unbroken, tmp_path, "cpu", 0, 1, 0)
    tokenizer = load_tokenizer(unbroken / "models/base")
    with pytest.raises(UserError, match=r"reward\.jsonl: none of \d+ pairs fits in 5 tokens .*raise reward's max_tokens"):
        read_pairs(job, tokenizer, "data/prepared/reward.jsonl", 5)
    with pytest.raises(UserError, match=r"ppo\.max_prompt_tokens: none of \d+ prompts fits in 5 tokens"):
        read_prompts(replace(job, stage="ppo"), tokenizer)
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


def test_the_loss_of_sft_counts_answers_or_everything(unbroken: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(unbroken / "models/base")
    found = {}
    for loss_on in ("assistant", "all"):
        raw = tiny_params()
        raw["sft"]["loss_on"] = loss_on
        found[loss_on], _ = read_rows(Job("sft", config.validate(raw, "params.yaml"), unbroken, tmp_path, "cpu", 0, 1, 0), tokenizer)
    for (ids, mask), (same, every) in zip(found["assistant"], found["all"], strict=True):
        assert ids == same
        assert every == [1] * len(ids)
        # from the first token of the last answer to its end
        assert 0 < sum(mask) < len(ids)
        assert mask[-1] == 1


def test_marks_say_what_of_a_dialogue_sft_learns_whatever_loss_on_says(unbroken: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(unbroken / "models/base")
    ask, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    marked = [ask, {**answer, "content": "No.", "weight": 0}, ask, answer]
    write_lines(tmp_path / "data/prepared/sft.jsonl", [{"messages": marked}, {"messages": [ask, answer]}])
    for loss_on, expected in (("assistant", "So.<|end|>"), ("all", "<|user|>Why?<|assistant|>So.<|end|>")):
        raw = tiny_params() | {"sft": tiny_params()["sft"] | {"loss_on": loss_on}}
        rows, _ = read_rows(Job("sft", config.validate(raw, "params.yaml"), tmp_path, tmp_path, "cpu", 0, 1, 0), tokenizer)
        learnt = [tokenizer.decode([token for token, counted in zip(ids, mask, strict=True) if counted]) for ids, mask in rows]
        assert learnt == ["So.<|end|>", expected]


def test_base_names_the_row_that_the_chat_template_does_not_show_before_it_trains(tmp_path: Path) -> None:
    make_workspace(tmp_path, tiny_params(), 60)
    thinking = {"role": "assistant", "content": "So.", "thinking": "Let me see."}
    example = [{"row": "data/raw/chat.jsonl:7", "messages": [{"role": "user", "content": "Why?"}, thinking]}]
    write_lines(tmp_path / "data/prepared/examples.jsonl", example)
    assert "UserError: data/raw/chat.jsonl:7: the chat template leaves out the answer's thinking" in run(tmp_path, "base", code=1)
    assert not (tmp_path / "models").exists()
