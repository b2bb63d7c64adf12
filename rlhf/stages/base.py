"""Stage base: the model that everything starts from.

`base.source: build` trains a byte-level BPE tokenizer and a tiny Llama on the text slice; `pretrained` pins a given model, so that every
later stage reads one local copy with safe weights, a chat template and a known end of turn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from rlhf.config.training import BuiltBase, PretrainedBase
from rlhf.engine.distributed import layout, start
from rlhf.engine.partition import born
from rlhf.engine.setup import frozen, settings
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run
from rlhf.models import examples, given, saving
from rlhf.models.dialogues import blocks
from rlhf.models.policy import build_policy, load_policy
from rlhf.models.tokenizer import build_tokenizer, load_tokenizer
from rlhf.stages.language_model import fit, perplexity
from rlhf.tensors import shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BASE = "models/base"
EXAMPLES = "data/prepared/examples.jsonl"


def main(job: Job) -> None:
    device = start(job)
    params = job.params.base
    if isinstance(params, BuiltBase):
        model, tokenizer, history = build(job, params)
    else:
        model, tokenizer = pin_once(job, params, device)
        examples.check(tokenizer, read_lines(job.input(EXAMPLES)))
        history = []
    held_out = [row["text"] for row in read_lines(job.input("data/prepared/heldout_text.jsonl"))]
    rows = blocks(held_out, tokenizer, 128)
    found = perplexity(model, rows, layout(job).micro_batch_tokens) if rows else None
    if found is not None and not math.isfinite(found) and isinstance(params, PretrainedBase):
        what = f"base.model '{params.model}' computes no numbers: its perplexity on held-out text is {found}"
        raise UserError(what, remedy="compare weights and config.json with the publisher's; in fp16, set launch.precision to bf16 or fp32")
    metrics = {
        "parameters": sum(math.prod(shape(p)) for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "loss": history[-1]["loss"] if history else None,
        "heldout_perplexity": found,
    }
    if isinstance(params, BuiltBase):
        saving.save(job, model, tokenizer, job.output(BASE))
    if job.is_main:
        job.write_metrics(metrics)
        job.write_plot("plots/base.csv", history)


def build(job: Job, params: BuiltBase) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[dict[str, float]]]:
    """Tokenizer and model from nothing, pretrained on packed text."""
    texts = [row["text"] for row in read_lines(job.input("data/prepared/text.jsonl"))]
    tokenizer = build_tokenizer(texts, params.vocab_size, params.context_tokens)
    examples.check(tokenizer, read_lines(job.input(EXAMPLES)))
    rows = blocks(texts, tokenizer, params.max_tokens)
    if not rows:
        raise UserError(
            f"data/prepared/text.jsonl: {len(texts)} passages do not fill one row of {params.max_tokens} tokens",
            remedy="give more text (data.sources with split.text above 0) or lower base.max_tokens",
        )
    model = build_policy(params, tokenizer, job.seed("weights"))
    job.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows):,} rows of {params.max_tokens} tokens")
    history = fit(job, model, [(row, [1] * len(row)) for row in rows], params)
    return model, tokenizer, history


def pin_once(job: Job, params: PretrainedBase, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Have rank 0 write the given model as stage output; all ranks then hold it as launch.engines.reference says."""
    folder = job.output(BASE)
    if job.is_main:
        for note in given.pin(params, folder):
            job.say(note)
    dist.barrier()
    with born(settings(job, "reference")):
        model = load_policy(folder, job.params.launch.precision)
    return frozen(model, job, "reference", device), load_tokenizer(folder)


if __name__ == "__main__":
    run("base", main)
