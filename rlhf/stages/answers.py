"""Stage answers, and answers-1, answers-2, … of iterative: several answers to each prompt, with their rewards, to train on afterwards.

Each round has prompts of its own. A round of iterative first measures the policy that it begins with on prompts that no round trains on;
where that is worse than the one before, the iteration is over: this round and those after it sample nothing, and say so.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.engine.distributed import join, start
from rlhf.engine.steps import Steps
from rlhf.job import Job, read_lines, run, write_lines
from rlhf.models import lora
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import rounds
from rlhf.stages.sampled import Prompt, Sampler, as_rollout, dealt, line, measure, read_given, read_prompts


def main(job: Job) -> None:
    device = start(job)
    number, iterates = job.number, job.params.policy == "iterative"
    before = rounds.measured(job, number - 1) if number > 1 else None
    if before and before["over"]:
        job.say(f"the iteration was over before round {number}: nothing is sampled")
        finish(job, [], {"over": True, "heldout_reward": None, "heldout_kl": None}, [])
        return
    tokenizer = load_tokenizer(job.input("models/sft"))
    prompts = read_prompts(job, tokenizer)
    sampler = Sampler.of(job, tokenizer, device, rounds.policy(number - 1))
    measured, heldout = look(sampler, prompts, before, device) if iterates else ({}, [])
    answered: list[dict[str, Any]] = []
    if not measured.get("over"):
        answered = sample(sampler, round_prompts(job, prompts, tokenizer))
    sampler.close()
    finish(job, answered, measured, heldout)


def round_prompts(job: Job, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Those of this round, in an order that does not change when there are more rounds."""
    params, number = job.params.answers, job.number
    apart = params.heldout_prompts if job.params.policy == "iterative" else 0
    own = dealt(prompts, apart + (number - 1) * params.prompts, params.prompts, "prompts", job)
    if params.pairs:
        asked = {json.dumps(prompt.row["prompt"]) for prompt in prompts}  # in this round, in another one, or held out
        given = [one for one in read_given(job, tokenizer) if json.dumps(one.row["prompt"]) not in asked]
        own += dealt(given, (number - 1) * params.pairs, params.pairs, "prompts of pairs", job)
    return own


def look(
    sampler: Sampler, prompts: Sequence[Prompt], before: dict[str, Any] | None, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the policy that the round begins with; the numbers, and its answers."""
    job, number = sampler.job, sampler.job.number
    apart = dealt(prompts, 0, job.params.answers.heldout_prompts, "prompts", job)
    reference = lora.reference(None, job, job.input("models/sft"), device) if number > 1 else None
    answers = measure(sampler, apart, reference)
    reward = statistics.fmean(one.score for one in answers)
    over = before is not None and reward < before["heldout_reward"]
    job.say(f"the policy of {number - 1} rounds has reward {reward:.4f} on {len(apart)} held-out prompts")
    if before and over:
        job.say(
            f"that is less than {before['heldout_reward']:.4f} before: the iteration is over, and the policy of {number - 2} rounds stays"
        )
    kl = statistics.fmean(one.kl or 0.0 for one in answers)
    return {"over": over, "heldout_reward": reward, "heldout_kl": kl}, [as_rollout(number - 1, apart[one.prompt], one) for one in answers]


def sample(sampler: Sampler, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The answers to all prompts, batch by batch; those that a killed run has made are there already."""
    job, params = sampler.job, sampler.job.params.answers
    path = job.folder / "answers.jsonl"
    size = params.batch_size
    batches = -(-len(prompts) // size)
    done = join([whole_batches(path, len(prompts), size) if job.is_main else 0], job)[0]
    if done:
        job.say(f"goes on from batch {done} of {batches}")
    steps = Steps(job, done, batches, 1)
    for step in steps:
        batch = prompts[step * size : (step + 1) * size]
        made = [
            one
            for temperature in params.temperatures
            for one in sampler.sample(batch, temperature, params.answers_per_temperature, job.seed)
        ]
        made += sampler.given(batch)
        scored = sampler.score(batch, made, step + 1)
        of_each = [[one for one in scored if one.prompt == place] for place in range(len(batch))]
        if job.is_main:
            several = len(job.params.rewards) > 1
            rows = [line(prompt, answers, several=several) for prompt, answers in zip(batch, of_each, strict=True)]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        numbers = {
            "reward": statistics.fmean(one.score for one in scored),
            "best_reward": statistics.fmean(max(one.score for one in own) for own in of_each),
        }
        job.log(step + 1, steps.total, {**numbers, "eos_rate": statistics.fmean(one.ended for one in scored), **sampler.rewards.seconds()})
        steps.checkpoint_due(step)  # what there is to keep is in the file
    return read_lines(path) if job.is_main else []


def whole_batches(path: Path, prompts: int, size: int) -> int:
    """How many batches a file holds; what a kill left of another one is cut off."""
    path.touch()
    lines = [text for text in path.read_bytes().splitlines(keepends=True) if text.endswith(b"\n")]
    kept = prompts if len(lines) == prompts else len(lines) // size * size
    os.truncate(path, sum(map(len, lines[:kept])))
    return -(-kept // size)


def finish(job: Job, answered: Sequence[dict[str, Any]], measured: dict[str, Any], heldout: Sequence[dict[str, Any]]) -> None:
    """Write the outputs."""
    if not job.is_main:
        return
    folder = rounds.folder(job.number)
    own = [[one for one in row["answers"] if one["by"] == "policy"] for row in answered]
    made = [one for answers in own for one in answers]
    numbers: dict[str, Any] = {
        "prompts": len(answered),
        "answers": len(made),
        "given": sum(len(row["answers"]) for row in answered) - len(made),
    }
    if made:
        numbers |= {"reward": statistics.fmean(one["score"] for one in made), "eos_rate": statistics.fmean(one["ended"] for one in made)}
        numbers["best_reward"] = statistics.fmean(max(one["score"] for one in answers) for answers in own)
    write_lines(job.output(f"{folder}/answers.jsonl"), answered)
    if measured:
        write_lines(job.output(f"{folder}/heldout.jsonl"), heldout)
    job.write_metrics({**measured, **numbers})


if __name__ == "__main__":
    run("answers", main)
