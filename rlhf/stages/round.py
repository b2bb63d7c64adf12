"""Stages round-1, round-2, … of iterative: pairs out of the round's answers, and DPO on them from the policy of the round before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.algorithms.pairing import pair
from rlhf.config.stored import RoundPairs
from rlhf.engine.distributed import start
from rlhf.engine.partition import born
from rlhf.engine.setup import settings
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run, write_lines
from rlhf.models import lora, saving
from rlhf.models.policy import load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import dpo, rounds


def main(job: Job) -> None:
    device = start(job)
    params, number = job.params.iterative, job.number
    made, output = f"{rounds.folder(number)}/pairs.jsonl", rounds.policy(number)
    if rounds.measured(job, number)["over"]:
        pass_on(job, made, output)
        return
    answered = read_lines(job.input(f"{rounds.folder(number)}/answers.jsonl"))
    new, without = make_pairs(answered, params.pairs)
    if not new:
        found = f"{without['ties']} prompts have answers with equal rewards, {without['cut_off']} such as were cut off"
        what = f"stage {job.stage}: no pair can be made: {found}"
        remedy = f"more answers.answers_per_temperature, a higher temperature, or rewards that tell answers apart; or {rounds.LONGER}"
        raise UserError(what, remedy=remedy)
    rounds.say_cut_off(job, without["cut_off"], len(answered))
    if job.is_main:
        write_lines(job.output(made), new)
    earlier = range(1, number) if params.pairs.rounds == "all" else range(0)
    rows = [row for before in earlier for row in read_lines(job.input(f"{rounds.folder(before)}/pairs.jsonl"))] + new
    tokenizer = load_tokenizer(job.input("models/sft"))
    last = rounds.policy(number - 1)
    with born(settings(job, "policy")):
        policy = load_policy(job.input(last), job.params.launch.precision)
    adapters = lora.attach(policy, params.dpo.lora, last, "iterative.dpo.lora", job)
    anchor = last if params.dpo.reference == "last" else "models/sft"
    reference = lora.reference(adapters if anchor == last else None, job, job.input(anchor), device)
    history = dpo.fit(job, policy, reference, [as_pair(row) for row in rows], params.dpo, "iterative.dpo")
    saving.save(job, policy, tokenizer, job.output(output), adapters)
    if job.is_main:
        counts = {"steps": len(history), "new_pairs": len(new), **without, "pairs": len(rows)}
        learnt = {name: history[-1][name] for name in ("loss", "accuracy", "margin")}
        job.write_metrics({"over": False, **learnt, **counts, **lora.share(adapters)})
        job.write_plot(f"plots/{job.stage}.csv", history)


def pass_on(job: Job, pairs: str, model: str) -> None:
    """What a round leaves that came after the last."""
    job.say(f"the iteration was over before round {job.number}: the policy of the round before is passed on")
    rounds.hand_on(job, job.number - 1, model)
    if job.is_main:
        write_lines(job.output(pairs), [])
        job.write_metrics({"over": True, "steps": 0, "new_pairs": 0, "ties": 0, "cut_off": 0, "pairs": 0})
        job.write_plot(f"plots/{job.stage}.csv", [{"step": 0, "loss": None, "accuracy": None}])


def make_pairs(rows: Sequence[dict[str, Any]], params: RoundPairs) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A pair of each prompt's answers, and how many prompts gave none: their answers are equally good, or the best of them cut off."""
    found = []
    without = {"ties": 0, "cut_off": 0}
    for row in rows:
        answers = row["answers"]
        rewards = [one["score"] - params.length_penalty * len(one["answer"]) for one in answers]
        ended = [one["ended"] for one in answers]
        if chosen := pair(rewards, ended, params.rejected):
            won, lost = (answers[number] for number in chosen)
            texts = {"prompt": row["prompt"], "chosen": won["answer"], "rejected": lost["answer"]}
            sides = {"chosen_tokens": won["tokens"], "rejected_tokens": lost["tokens"]}
            found.append({**texts, "scores": [won["score"], lost["score"]], "prompt_tokens": row["prompt_tokens"], **sides})
        else:
            without["ties" if any(ended) and len(set(rewards)) == 1 else "cut_off"] += 1
    return found, without


def as_pair(row: dict[str, Any]) -> dpo.Pair:
    """Both sides as they were sampled: their texts might not give the same tokens again."""
    prompt = row["prompt_tokens"]
    won, lost = (([*prompt, *row[side]], [0] * len(prompt) + [1] * len(row[side])) for side in ("chosen_tokens", "rejected_tokens"))
    return won, lost


if __name__ == "__main__":
    run("round", main)
