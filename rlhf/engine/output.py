"""A trained model as an ordinary Hugging Face folder, however its ranks hold it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.engine.partition import whole_weights
from rlhf.job import Job
from rlhf.models.lora import Adapters
from rlhf.models.policy import save_model


def save(job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, adapters: Adapters | None = None) -> None:
    """Have rank 0 write the model, and its adapters beside it; all ranks must call it, and the model is not to be used afterwards."""
    weights = whole_weights(model)
    if not job.is_main:
        return
    if adapters:
        if weights:
            adapters = adapters.holding(weights)
            model, weights = adapters.model, None
        adapters.save_and_merge(folder / "adapter")
    save_model(model, tokenizer, folder, weights)
