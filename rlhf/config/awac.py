"""Section awac: a warm start from answers that earlier versions left behind, before ppo or grpo."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from rlhf.config.section import Positive, Section
from rlhf.config.training import Lora, Optimizer


class Awac(Section):
    """Warm start of the policy (AWAC, arXiv 2006.09359), where `algorithm` samples answers of its own."""

    versions: Annotated[int, Field(ge=0)] = Field(
        description="`rlhf use` and `rlhf ingest` bring the answers of so many of the newest registered versions into data/raw/earlier; "
        "0: off"
    )
    epochs: Positive = Field(description="passes over the answers, each in a fresh order")
    batch_size: PositiveInt = Field(description="answers per optimiser step, over all processes")
    max_tokens: PositiveInt = Field(description="answers that are longer with their prompts are left out and counted")
    advantage_temperature: Positive = Field(
        description="λ: an answer counts exp(A / λ) times, A being its reward less the mean of its prompt's answers; the lower, the more "
        "the best alone are learnt"
    )
    max_weight: Annotated[float, Field(ge=1)] = Field(description="c: an answer counts so much at most, before the batch's mean is 1")
    lora: Lora | None = Field(description="adapters; null: all weights are trained")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")
