"""Stage sft: supervised fine-tuning of base on the demonstrations; the loss counts the assistant's tokens only."""

from __future__ import annotations

from rlhf.data.batches import encode_dialogue
from rlhf.engine.distributed import start
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run
from rlhf.models.policy import load_policy, save_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.language_model import fit


def main(job: Job) -> None:
    start(job)
    params = job.params.sft
    base = job.input("models/base")
    tokenizer = load_tokenizer(base)
    encoded = [encode_dialogue(tokenizer, row["messages"]) for row in read_lines(job.input("data/prepared/sft.jsonl"))]
    rows = [row for row in encoded if len(row[0]) <= params.max_tokens]
    if not rows:
        raise UserError(
            f"sft.max_tokens: none of {len(encoded)} dialogues fits in {params.max_tokens} tokens", remedy="raise sft.max_tokens"
        )
    model = load_policy(base, job.params.launch.precision)
    history = fit(job, model, rows, params, tokenizer.pad_token_id)
    if job.is_main:
        save_model(model, tokenizer, job.output("models/sft"))
        job.write_metrics({"loss": history[-1]["loss"], "steps": len(history), "rows": len(rows), "too_long": len(encoded) - len(rows)})
        job.write_plot("plots/sft.csv", history)


if __name__ == "__main__":
    run("sft", main)
