"""Sections promote, launch and tracking: the gates, where and how to run, and where metrics go."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from rlhf.config.section import Fraction, NonNegative, Positive, Section, Slug
from rlhf.redact import holds_password

Share = Annotated[float, Field(ge=-1, le=1)]


class Approval(Section):
    """Whether a person has the last word."""

    required: bool = Field(
        description="the flow asks in Prefect (needs a server, see `make serve`) before it promotes a version that passed"
    )
    wait_minutes: Positive = Field(description="who has not answered by then has declined; `rlhf promote` does it later")


class Promote(Section):
    """Gates: a version becomes champion only if every one holds."""

    model: Slug = Field(
        description="name of the registered model: one line of versions, each compared with the champion of that name; a preset has its own"
    )
    min_gold_difference: float = Field(
        description="gold score of the policy − sft, lower end of its 95% interval (where a gold score exists)"
    )
    min_win_rate: Fraction = Field(description="win rate against sft, lower end of its 95% interval")
    min_length_controlled_win_rate: Fraction | None = Field(
        description="the same for answers of one length: a policy that wins by writing more, or less, falls short; null: it does not decide"
    )
    min_reward_accuracy: Fraction = Field(description="accuracy of the reward model, or of dpo's implicit reward, on held-out pairs")
    max_kl: Positive = Field(description="KL to sft per answer, in nats")
    max_perplexity_ratio: Positive = Field(description="perplexity on plain text, policy over sft")
    min_eos_rate: Fraction = Field(description="share of answers that end by themselves")
    max_answer_tokens: Positive = Field(description="mean answer length, in tokens")
    min_champion_win_rate: Fraction = Field(
        description="win rate against the champion on the same held-out prompts, lower end of its 95% interval; 0.5 is as good as it"
    )
    min_kind_win_rate: Fraction = Field(
        description="the same for each kind of task by itself, upper end of the interval: below it, this kind has surely become worse"
    )
    min_accuracy: Fraction = Field(
        description="accuracy by the reward functions that tell right from wrong (right_from), lower end of its 95% interval; this and the "
        "next three hold where there are such"
    )
    min_accuracy_difference: Share = Field(description="accuracy of the policy − sft, lower end of its 95% interval")
    min_champion_accuracy_difference: Share = Field(description="accuracy of the policy − the champion on the same prompts, lower end")
    min_kind_accuracy_difference: Share = Field(
        description="the same for each kind of task by itself, upper end of the interval: below it, this kind has surely become worse"
    )
    approval: Approval


class Operations(Section):
    """How runs of the flow go about in a workspace."""

    when_busy: Literal["refuse", "queue"] = Field(
        description="what a flow does while another one runs in the same workspace: end at once, or wait"
    )
    spare_gib: NonNegative = Field(
        description="a stage starts only if what it writes at most (docs/team.md says how it is estimated) leaves so much of the disk free"
    )
    notify: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = Field(
        description="web address that a server of `rlhf serve` tells of runs that failed or were refused (JSON, by POST); RLHF_NOTIFY_URL "
        "in the environment goes first; null: nobody is told"
    )

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        # params.yaml is committed, and stored with each version
        if self.notify is not None and holds_password(self.notify):
            raise ValueError("notify holds a password: give such an address in the environment, as RLHF_NOTIFY_URL")
        return self


class JobLayout(Section):
    """How one stage's processes are laid out."""

    processes: PositiveInt = Field(description="ranks per node; on GPU, one GPU each")
    threads: PositiveInt = Field(description="CPU threads per rank")
    micro_batch_tokens: PositiveInt = Field(
        description="tokens that one rank passes through the model at a time, at most; a longer row goes alone"
    )


class Jobs(Section):
    base: JobLayout
    sft: JobLayout
    reward: JobLayout
    awac: JobLayout
    ppo: JobLayout
    grpo: JobLayout
    dpo: JobLayout
    answers: JobLayout = Field(description="stages answers and answers-1, answers-2, …")
    best_of_n: JobLayout
    rrhf: JobLayout
    round: JobLayout = Field(description="stages round-1, round-2, … of iterative")
    iterative: JobLayout
    evaluate: JobLayout


class FrozenEngine(Section):
    """How the ranks hold a model that is only scored with."""

    zero_stage: Literal[0, 3] = Field(description="0: each rank holds the whole model; 3: each rank holds its part of every parameter")
    offload_parameters: bool = Field(description="keep the parts in the CPU's memory between uses; with zero_stage 3")

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        if type(value) is not int:  # to a Literal, false and 0.0 are 0
            raise ValueError("Input should be 0 or 3")
        return value

    @model_validator(mode="after")
    def _offload(self) -> Self:
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, but it is {self.zero_stage}")
        return self


class Engine(Section):
    """How the ranks hold a model that is trained (ZeRO, arXiv 1910.02054)."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        description="what the ranks share out: 0 nothing, 1 optimiser states, 2 gradients too, 3 parameters too; 0 counts as 1 in half "
        "precision, whose fp32 weights are optimiser states"
    )
    offload_optimizer: bool = Field(description="keep optimiser states and step in the CPU's memory; with zero_stage 1 to 3")
    offload_parameters: bool = Field(description="keep the parts in the CPU's memory between uses; with zero_stage 3")

    @model_validator(mode="after")
    def _offload(self) -> Self:
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, but it is {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage < 1:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, but it is 0")
        return self


class Engines(Section):
    """DeepSpeed's settings of each model."""

    policy: Engine = Field(description="the model that base, sft, dpo, best_of_n, rrhf and round train, and the actor of ppo and grpo")
    critic: Engine = Field(description="the reward model while it is trained (stage reward, the judge), and ppo's critic")
    reference: FrozenEngine = Field(description="the frozen policy that ppo, grpo and dpo keep near to, and the one that only samples")
    reward: FrozenEngine = Field(description="the frozen reward model of the stages that score answers")


class Rollout(Section):
    """How each rank samples answers (ppo, grpo, answers, iterative, evaluate)."""

    slots: PositiveInt = Field(description="answers that a rank writes at a time; one that ends makes room for the next prompt")
    gather: Literal["whole", "layers"] = Field(
        description="where ZeRO-3 shares out the policy: whole, each rank gathers all of it once for a rollout; layers, one layer at a "
        "time, again for every token: slow, for models that no rank can hold"
    )


class Checkpoints(Section):
    keep: PositiveInt = Field(description="so many of a stage's newest checkpoints stay until it has ended, and its best one besides")


class Launch(Section):
    """Where and how to run. No stage depends on it, precision aside: batch sizes are global, so the hardware changes no result."""

    accelerator: Literal["auto", "cpu", "cuda"] = Field(description="auto: cuda where a GPU is present, else cpu")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        description="arithmetic of the models; optimiser states are fp32, and fp16 scales its loss dynamically. `rlhf use PRESET "
        "launch.precision=auto` writes the one that this machine is quick at"
    )
    engines: Engines
    rollout: Rollout
    gradient_checkpointing: bool = Field(description="compute activations again in the backward pass: less memory, a third more work")
    checkpoints: Checkpoints
    hostfile: str | None = Field(description="DeepSpeed hostfile for several nodes; null: this machine")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(description="rendezvous port of the ranks; 0: a free one")
    timeout_minutes: Positive = Field(description="a stage that runs longer is stopped")
    jobs: Jobs


class Tracking(Section):
    uri: str | None = Field(description="MLflow tracking server; null: the database mlruns/mlflow.db; MLFLOW_TRACKING_URI goes first")
    experiment: str = Field(description="MLflow experiment of the runs")

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        # params.yaml is committed, and stored with each version
        if self.uri is not None and holds_password(self.uri):
            raise ValueError("uri holds a password: give such an address in the environment, as MLFLOW_TRACKING_URI")
        return self
