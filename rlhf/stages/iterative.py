"""Stage iterative: measures the last round's policy as the rounds measured those before, and hands the best one on."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from rlhf.engine.distributed import start
from rlhf.job import Job, read_lines, run, write_lines
from rlhf.models import lora
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import rounds
from rlhf.stages.sampled import Sampler, as_rollout, dealt, measure, read_prompts

COUNTS = ("new_pairs", "pairs", "ties", "cut_off")


def main(job: Job) -> None:
    device = start(job)
    count = job.params.iterative.rounds
    numbers = range(1, count + 1)
    before = [rounds.measured(job, number) for number in numbers]
    rewards = [one["heldout_reward"] for one in before if one["heldout_reward"] is not None]
    distances = [one["heldout_kl"] for one in before if one["heldout_kl"] is not None]
    rollouts = [row for number in numbers for row in read_lines(job.input(f"{rounds.folder(number)}/heldout.jsonl"))]
    if not before[-1]["over"]:
        last = measure_last(job, device)
        rewards.append(statistics.fmean(row["score"] for row in last))
        distances.append(statistics.fmean(row["kl"] for row in last))
        rollouts += last
    best = rounds.best(rewards)
    job.say(
        f"handed on: the policy of {best} of {count} rounds, with reward {rewards[best]:.4f} on held-out prompts, sft's {rewards[0]:.4f}"
    )
    rounds.hand_on(job, best, "models/iterative")
    if job.is_main:
        write_lines(job.output("data/rollouts.jsonl"), rollouts)
        write_numbers(job, best, rewards, distances)


def measure_last(job: Job, device: torch.device) -> list[dict[str, Any]]:
    """The held-out answers of the policy of all rounds."""
    count = job.params.iterative.rounds
    tokenizer = load_tokenizer(job.input("models/sft"))
    apart = dealt(read_prompts(job, tokenizer), 0, job.params.answers.heldout_prompts, "prompts", job)
    sampler = Sampler.of(job, tokenizer, device, rounds.policy(count))
    answers = measure(sampler, apart, lora.reference(None, job, job.input("models/sft"), device))
    sampler.close()
    return [as_rollout(count, apart[one.prompt], one) for one in answers]


def write_numbers(job: Job, best: int, rewards: list[float], distances: list[float]) -> None:
    """A row for each policy that was measured; sft's is round 0."""
    table = []
    for number, (reward, distance) in enumerate(zip(rewards, distances, strict=True)):
        made = rounds.measured(job, number, "round") if number else dict.fromkeys(COUNTS, 0)
        own = {name: made[name] for name in COUNTS}
        table.append({"round": number, "heldout_reward": reward, "heldout_kl": distance, **own})
    job.write_plot("plots/iterative.csv", table)
    worse = len(rewards) > 1 and rewards[-1] < rewards[-2]
    by_round = [{name: value for name, value in row.items() if name != "round"} for row in table]
    for number, row in enumerate(by_round):
        job.log(number + 1, len(by_round), row)
    job.write_metrics(
        {
            "best": best,
            "heldout_reward": rewards[best],
            "stopped_by": len(rewards) - 1 if worse else None,
            "rounds": {str(number): row for number, row in enumerate(by_round)},
        }
    )


if __name__ == "__main__":
    run("iterative", main)
