"""The champion's answers to the held-out prompts of this evaluation, judged as evaluate judged the new policy's.

No stage of the graph: which version is in service is no input of a model. rlhf/registry/comparison.py starts it, before the gates.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.engine.distributed import start
from rlhf.job import Job, read_lines, run, write_lines
from rlhf.models.dialogues import decode_answer, short_enough
from rlhf.models.policy import context_of
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import checking, evaluate

CHAMPION = "champion.json"  # in the job's folder: where the champion lies, what made it, whether it was evaluated like this version
OUTPUT = "comparison.jsonl"


def main(job: Job) -> None:
    # laid out, and seeded, as evaluate is
    job = replace(job, stage="evaluate")
    device = start(job)
    rows = read_lines(job.input(evaluate.ANSWERS))
    champion = json.loads((job.folder / CHAMPION).read_text(encoding="utf-8"))
    folder, name = Path(champion["folder"]), champion["algorithm"]
    if champion["same_evaluation"]:
        earlier = {json.dumps(row["prompt"]): row for row in read_lines(folder.parent / "evaluation.jsonl")}
        found = [earlier[json.dumps(row["prompt"])] for row in rows]
        answers, scores = [row["answers"][name] for row in found], [row["scores"][name] for row in found]
    else:
        asked = len(rows)
        rows = short_enough(load_tokenizer(folder), rows, context_of(folder) - job.params.answering.max_answer_tokens)
        if len(rows) < asked:
            job.say(f"{asked - len(rows)} of {asked} prompts are left out: the champion has no room for them and an answer")
        answers = answers_of(job, folder, rows, device) if rows else []
        scores = judge(job, rows, answers, device) if rows else []
    new = job.params.policy
    rewards: list[Any] = rewards_of(job, rows, answers, device) if rows and job.params.trains_reward else [None] * len(rows)
    right = right_of(job, folder, name, rows, answers, device, same=champion["same_evaluation"])
    if job.is_main:
        lines = [
            {
                "prompt": row["prompt"],
                "kind": checking.kind_of(row),
                "answers": {"new": row["answers"][new], "champion": answers[i]},
                "scores": {"new": row["scores"][new], "champion": scores[i]},
                "rewards": {"new": row["rewards"].get(new), "champion": rewards[i]},
                **({"right": {"new": row["right"][new], "champion": right[i]}} if i in right else {}),
            }
            for i, row in enumerate(rows)
        ]
        write_lines(job.output(OUTPUT), lines)


def right_of(
    job: Job, folder: Path, name: str, rows: list[dict[str, Any]], answers: list[str], device: torch.device, *, same: bool
) -> dict[int, list[bool]]:
    """Whether each of the champion's answers is right, by the number of the prompt; none where nothing tells.

    Args:
        name: of the stage that made it.
        answers: its first ones.
        same: it was evaluated like this version.
    """
    checked = [i for i, row in enumerate(rows) if row.get("right")]
    if not checked:
        return {}
    if same:
        earlier = {
            json.dumps(row["prompt"]): row["right"][name] for row in read_lines(folder.parent / "evaluation.jsonl") if row.get("right")
        }
        return {i: earlier[json.dumps(rows[i]["prompt"])] for i in checked}
    tokenizer = load_tokenizer(folder)
    policy = evaluate.frozen_policy(job, folder, device)
    several = evaluate.several_answers(job, policy, tokenizer, rows, answers)
    return dict(zip(checked, checking.check(job, [rows[i] for i in checked], [several[i] for i in checked]).right, strict=True))


def answers_of(job: Job, folder: Path, rows: list[dict[str, Any]], device: torch.device) -> list[str]:
    """What the model in `folder` answers, sampled as evaluate samples."""
    tokenizer = load_tokenizer(folder)
    rollouts = evaluate.answer(job, evaluate.frozen_policy(job, folder, device), tokenizer, rows)
    return [decode_answer(tokenizer, ids) for ids in rollouts.answers]


def judge(job: Job, rows: list[dict[str, Any]], answers: list[str], device: torch.device) -> list[float]:
    """The scores of evaluate's judge."""
    if not job.params.trains_judge:
        return evaluate.make_judge(job, load_tokenizer(job.input("models/sft"))).score(rows, answers)
    return scored(job, evaluate.JUDGE, load_tokenizer(job.input(evaluate.JUDGE)), rows, answers, device)


def rewards_of(job: Job, rows: list[dict[str, Any]], answers: list[str], device: torch.device) -> list[float]:
    """The scores of the reward model that the new policy was trained against."""
    return scored(job, "models/reward", load_tokenizer(job.input("models/reward")), rows, answers, device)


def scored(
    job: Job, path: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], answers: list[str], device: torch.device
) -> list[float]:
    model = evaluate.frozen_scalar(job, path, tokenizer, device)
    return evaluate.reward_scores(model, tokenizer, rows, answers, job)


if __name__ == "__main__":
    run("evaluate", main)
