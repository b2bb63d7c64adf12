"""Sections answers, best_of_n, rrhf and iterative: training on answers that were sampled before, and ranked by the rewards."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rlhf.config.section import NonNegative, Positive, Section, Temperature
from rlhf.config.training import Lengths, Lora, Optimizer, Preference


class Answers(Lengths):
    """How answers are sampled before training, where `algorithm` is best-of-n, rrhf or iterative."""

    prompts: PositiveInt = Field(description="prompts that are answered; iterative: in each round, other ones")
    pairs: Annotated[int, Field(ge=0)] = Field(
        description="so many prompts of preference pairs are answered besides, and the answers that are given there, a person's edits "
        "among them, stand beside the policy's"
    )
    heldout_prompts: PositiveInt = Field(
        description="iterative: so many prompts are kept apart, on which each round's policy is measured by the rewards"
    )
    temperatures: list[Temperature] = Field(min_length=1, description="sampling temperatures; the first is that of held-out prompts")
    answers_per_temperature: PositiveInt = Field(description="answers to each prompt at each temperature")
    top_k: Annotated[int, Field(ge=0)] = Field(description="sample among the k likeliest tokens; 0: all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(description="sample in the nucleus of this mass; 1: all")
    batch_size: PositiveInt = Field(description="prompts answered at a time, over all processes; after each batch the answers are kept")

    @model_validator(mode="after")
    def _several(self) -> Self:
        if len(self.temperatures) * self.answers_per_temperature < 2:
            raise ValueError("temperatures and answers_per_temperature give one answer to a prompt, which ranks nothing: 2 at least")
        return self

    @property
    def mixture_coefficient(self) -> float:
        """Plain text is not mixed in."""
        return 0.0


class BestOfN(Section):
    """Supervised fine-tuning of sft's policy on the best of its own answers (rejection sampling), where `algorithm` is best-of-n."""

    epochs: Positive = Field(description="passes over the best answers, each in a fresh order")
    batch_size: PositiveInt = Field(description="prompts per optimiser step, over all processes")
    lora: Lora | None = Field(description="adapters; null: all weights are trained")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")


class Rrhf(BestOfN):
    """Ranking of answers by their probabilities as the rewards rank them (arXiv 2304.05302), where `algorithm` is rrhf."""

    length_exponent: NonNegative = Field(description="α of an answer's score log π(answer) / tokens^α; 1: mean of its tokens")
    ranking_weight: NonNegative = Field(
        description="weight of the ranking loss, a mean over the pairs of a prompt's answers; that of the best answer's loss is 1"
    )


class RoundPairs(Section):
    """How a round makes pairs of its answers."""

    rejected: Literal["worst", "two-sigma"] = Field(
        description="which answer loses against the best one: the worst; or the one nearest to μ − 2σ of the prompt's rewards, for many "
        "answers, the worst of which tells little (arXiv 2502.16825)"
    )
    length_penalty: NonNegative = Field(description="comes off an answer's reward for each of its characters, before answers are compared")
    rounds: Literal["all", "new"] = Field(description="what a round trains on: the pairs of all rounds so far, or its own")


class RoundDpo(Preference):
    """How a round trains on its pairs: by DPO, from the policy of the round before."""

    reference: Literal["sft", "last"] = Field(description="the reference policy: sft's, or the one of the round before")


class Iterative(Section):
    """DPO in rounds, each on answers of the last one's policy (RLHF Workflow, arXiv 2405.07863), where `algorithm` is iterative."""

    rounds: PositiveInt = Field(description="rounds; one more goes on from those that are there")
    pairs: RoundPairs
    dpo: RoundDpo
