"""Sections promote, launch and tracking: the gates, where and how to run, and where metrics go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf.config.section import Fraction, NonNegative, Positive, Section, Slug


class Promote(Section):
    """Gates: a version becomes champion only if every one holds."""

    model: Slug = Field(description="name of the registered model")
    min_gold_difference: float = Field(description="gold score of ppo − sft, lower end of its 95% interval (where a gold score exists)")
    min_win_rate: Fraction = Field(description="win rate against sft, lower end of its 95% interval")
    min_reward_accuracy: Fraction = Field(description="reward model's accuracy on held-out pairs")
    max_kl: Positive = Field(description="KL to sft per answer, in nats")
    max_perplexity_ratio: Positive = Field(description="perplexity on plain text, ppo over sft")
    min_eos_rate: Fraction = Field(description="share of answers that end by themselves")
    max_answer_tokens: Positive = Field(description="mean answer length, in tokens")
    max_regression: NonNegative = Field(
        description="how far the score (gold, or else win rate) may lie below the champion's on the same held-out set"
    )


class JobLayout(Section):
    """How one stage's processes are laid out."""

    processes: PositiveInt = Field(description="ranks per node; on GPU, one GPU each")
    threads: PositiveInt = Field(description="CPU threads per rank")
    micro_batch_size: PositiveInt = Field(
        description="rows that one rank passes through the model at a time; less where the batch is smaller"
    )


class Jobs(Section):
    base: JobLayout
    sft: JobLayout
    reward: JobLayout
    ppo: JobLayout
    evaluate: JobLayout


class Launch(Section):
    """Where and how to run. No stage depends on it, precision aside: batch sizes are global, so the hardware changes no result."""

    accelerator: Literal["auto", "cpu", "cuda"] = Field(description="auto: cuda where a GPU is present, else cpu")
    precision: Literal["fp32", "bf16"] = Field(description="arithmetic of the models; optimiser states are fp32")
    zero_stage: Annotated[int, Field(ge=0, le=2)] = Field(description="DeepSpeed ZeRO stage of the trained models")
    hostfile: str | None = Field(description="DeepSpeed hostfile for several nodes; null: this machine")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(description="rendezvous port of the ranks; 0: a free one")
    timeout_minutes: Positive = Field(description="a stage that runs longer is stopped")
    jobs: Jobs


class Tracking(Section):
    uri: str | None = Field(description="MLflow tracking server; null: the database mlruns/mlflow.db; MLFLOW_TRACKING_URI goes first")
    experiment: str = Field(description="MLflow experiment of the runs")
