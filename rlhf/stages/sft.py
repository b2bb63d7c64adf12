"""Stage sft: supervised fine-tuning of base on the demonstrations; the loss counts the assistant's tokens, or all."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf.engine.distributed import start
from rlhf.engine.partition import born
from rlhf.engine.setup import settings
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run
from rlhf.models import lora, saving
from rlhf.models.dialogues import encode_dialogues
from rlhf.models.policy import check_length, load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.language_model import Row, fit


def main(job: Job) -> None:
    start(job)
    params = job.params.sft
    base = job.input("models/base")
    tokenizer = load_tokenizer(base)
    rows, too_long = read_rows(job, tokenizer)
    with born(settings(job, "policy")):
        model = load_policy(base, job.params.launch.precision)
    check_length(model, params.max_tokens, "sft.max_tokens")
    adapters = lora.attach(model, params.lora, "models/base", "sft.lora", job)
    history = fit(job, model, rows, params)
    saving.save(job, model, tokenizer, job.output("models/sft"), adapters)
    if job.is_main:
        counts = {"steps": len(history), "rows": len(rows), "too_long": too_long}
        job.write_metrics({"loss": history[-1]["loss"], **counts, **lora.share(adapters)})
        job.write_plot("plots/sft.csv", history)


def read_rows(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], int]:
    """The demonstrations as token ids and loss masks, and how many were left out as too long.

    Raises:
        UserError: none fits.
    """
    params = job.params.sft
    dialogues = [row["messages"] for row in read_lines(job.input("data/prepared/sft.jsonl"))]
    encoded = encode_dialogues(tokenizer, dialogues)
    # a dialogue with marks says itself what of it is to be learnt
    whole = [params.loss_on == "all" and not any("weight" in turn for turn in messages) for messages in dialogues]
    learnt = ((ids, [1] * len(ids) if all_of_it else mask) for (ids, mask), all_of_it in zip(encoded, whole, strict=True))
    rows = [row for row in learnt if len(row[0]) <= params.max_tokens]
    if not rows:
        raise UserError(
            f"sft.max_tokens: none of {len(encoded)} dialogues fits in {params.max_tokens} tokens", remedy="raise sft.max_tokens"
        )
    return rows, len(encoded) - len(rows)


if __name__ == "__main__":
    run("sft", main)
