"""Stage best_of_n: supervised fine-tuning of the sft policy on the best of its answers to each prompt (rejection sampling)."""

from __future__ import annotations

import statistics

from rlhf.engine.distributed import start
from rlhf.engine.partition import born
from rlhf.engine.setup import settings
from rlhf.job import Job, run
from rlhf.models import lora, saving
from rlhf.models.policy import load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import rounds
from rlhf.stages.language_model import Row, fit


def main(job: Job) -> None:
    start(job)
    params = job.params.best_of_n
    tokenizer = load_tokenizer(job.input("models/sft"))
    ranked, cut_off = rounds.read_ranked(job)
    with born(settings(job, "policy")):
        model = load_policy(job.input("models/sft"), job.params.launch.precision)
    adapters = lora.attach(model, params.lora, "models/sft", "best_of_n.lora", job)
    history = fit(job, model, [as_row(row) for row in ranked], params)
    saving.save(job, model, tokenizer, job.output("models/best_of_n"), adapters)
    if job.is_main:
        counts = {"steps": len(history), "rows": len(ranked), "cut_off": cut_off}
        reward = statistics.fmean(row.rewards[row.best] for row in ranked)
        job.write_metrics({"loss": history[-1]["loss"], "reward": reward, **counts, **lora.share(adapters)})
        job.write_plot("plots/best_of_n.csv", history)


def as_row(ranked: rounds.Ranked) -> Row:
    """The prompt with its best answer, which alone is learnt."""
    answer = ranked.answers[ranked.best]
    return [*ranked.prompt, *answer], [0] * len(ranked.prompt) + [1] * len(answer)


if __name__ == "__main__":
    run("best_of_n", main)
