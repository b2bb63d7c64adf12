"""Section grpo: training without a critic, on several answers to each prompt."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rlhf.config.section import Fraction, NonNegative, Positive, Section
from rlhf.config.training import Answering

OF_SEVERAL = ("mean", "leave-one-out", "length-weighted")  # baselines that the answers to a prompt make up together


class GroupKl(Section):
    """What keeps the policy near its reference, sft."""

    where: Literal["none", "answer", "token", "loss"] = Field(
        description="none: nowhere, it is only measured; answer: β·Σ k1 comes off an answer's reward, before the baseline (RLOO); token: "
        "β·k1 comes off each token's reward (REINFORCE++); loss: a term of the loss (GRPO)"
    )
    coefficient: NonNegative = Field(description="β")
    estimator: Literal["k1", "k2", "k3"] = Field(description="per-token KL estimator (Schulman 2020); in the reward it is k1")
    with_ratio: bool = Field(description="as a loss: times the token's importance ratio, which makes up for several updates on a rollout")


class Overlong(Section):
    """Soft punishment of answers that come near the longest allowed (DAPO, arXiv 2503.14476, section 3.4)."""

    buffer: PositiveInt = Field(description="so many of the last tokens up to max_answer_tokens cost, the more the later")
    factor: Positive = Field(description="what an answer of max_answer_tokens loses of its reward")


class Mismatch(Section):
    """Weights w = π_old / π_rollout that make up for a sampler which computes otherwise than training: half precision, top_k, top_p."""

    correction: Literal["none", "tis", "icepop", "sequence"] = Field(
        description="none; tis: each token's w, held within low and high; icepop: w, tokens outside left out; sequence: answers whose "
        "geometric mean of w is outside left out. What is left out still counts in the normaliser"
    )
    low: NonNegative = Field(description="lowest w")
    high: Positive = Field(description="highest w")


class Grpo(Answering):
    """Training without a critic, where `algorithm` is neither ppo nor dpo; `rlhf use PRESET algorithm=NAME` writes what NAME stands for."""

    answers_per_prompt: PositiveInt = Field(description="k; divides mini_batch_size: the answers to a prompt stay in one mini-batch")
    baseline: Literal["none", "mean", "leave-one-out", "length-weighted", "greedy"] = Field(
        description="what is subtracted from a reward: mean of the prompt's answers; of the others; mean weighted by length (OPO); reward "
        "of the likeliest answer, which is generated beside (ReMax)"
    )
    scale: Literal["none", "group", "batch"] = Field(
        description="what advantages are divided by: group, the standard deviation of the prompt's rewards; batch: whitened over all "
        "tokens of the rollout"
    )
    scale_epsilon: Positive = Field(description="added to the standard deviation of a group")
    gamma: Fraction = Field(description="discount γ of a token's return")
    ratio: Literal["token", "sequence-sum", "sequence-mean", "sequence-token"] = Field(
        description="importance ratio: of each token; of the answer; the answer's geometric mean (GSPO); the same with each token's own "
        "gradient (GSPO-token)"
    )
    objective: Literal["clip", "cispo"] = Field(
        description="clip: policy_clip and dual_clip; cispo: the ratio, held within ratio_cap, weighs the gradient of log π"
    )
    ratio_cap: tuple[NonNegative, Positive] = Field(
        strict=False, description="cispo: lowest and highest ratio; both are caps as they stand, not distances from 1"
    )
    normaliser: Literal["tokens", "answers", "constant", "sequences"] = Field(
        description="tokens: mean over all tokens of the mini-batch; answers: over an answer's tokens, then over answers; constant: sum "
        "over normaliser_tokens (Dr.GRPO), then over answers; sequences: sum over an answer's tokens, mean over answers"
    )
    normaliser_tokens: PositiveInt | None = Field(description="constant: L, by which each answer's sum is divided; null: max_answer_tokens")
    kl: GroupKl
    reference_every: PositiveInt | None = Field(description="steps after which the policy becomes its own reference; null: it stays sft")
    overlong: Overlong | None = Field(description="null: off")
    resample_rounds: Annotated[int, Field(ge=0)] = Field(
        description="prompts whose answers all have the same reward are replaced by new ones, in so many rounds at most (dynamic "
        "sampling, DAPO); 0: off"
    )
    mismatch: Mismatch

    @model_validator(mode="after")
    def _groups(self) -> Self:
        k = self.answers_per_prompt
        if self.mini_batch_size % k:
            raise ValueError(f"answers_per_prompt ({k}) must divide mini_batch_size ({self.mini_batch_size})")
        if k < 2 and self.baseline in OF_SEVERAL:
            raise ValueError(f"baseline {self.baseline} is made of several answers to a prompt, but answers_per_prompt is {k}: 2 at least")
        if k < 2 and self.scale == "group":
            raise ValueError("scale: group divides by the spread of the answers to a prompt, but answers_per_prompt is 1: 2 at least")
        if k < 2 and self.resample_rounds:
            raise ValueError("resample_rounds: one answer is always as good as itself: answers_per_prompt 2 at least, or 0 rounds")
        if self.scale == "group" and self.baseline == "none":
            raise ValueError("scale: group divides a distance from the prompt's other answers, but baseline is none")
        if self.baseline == "length-weighted" and self.updates_per_step > 1:
            raise ValueError(
                f"baseline length-weighted is the best one for the policy that sampled alone, but a rollout has {self.updates_per_step} "
                "updates: set mini_batch_size to rollout_batch_size, and epochs to 1"
            )
        if self.overlong and self.overlong.buffer > self.max_answer_tokens:
            raise ValueError(f"overlong.buffer ({self.overlong.buffer}) is longer than an answer (max_answer_tokens)")
        return self

    @model_validator(mode="after")
    def _loss(self) -> Self:
        if self.ratio != "token" and self.normaliser != "answers":
            raise ValueError(f"ratio {self.ratio} is one number for a whole answer, which is then counted once: set normaliser to answers")
        if self.ratio in ("sequence-sum", "sequence-mean") and (self.kl.where == "token" or self.gamma < 1):
            raise ValueError(
                f"ratio {self.ratio} stands for a whole answer, but with kl.where: token, or gamma below 1, each token has an advantage of "
                "its own: set ratio to token or sequence-token"
            )
        if self.objective == "cispo" and self.ratio != "token":
            raise ValueError(f"objective: cispo caps the ratio of each token, but ratio is {self.ratio}")
        if self.objective == "cispo" and self.dual_clip is not None:
            raise ValueError("objective: cispo clips by ratio_cap alone: set dual_clip to null")
        if not self.ratio_cap[0] <= 1 <= self.ratio_cap[1]:
            raise ValueError(f"ratio_cap {list(self.ratio_cap)} leaves out 1, the ratio of the policy that sampled")
        if self.mismatch.correction != "none" and not self.mismatch.low <= 1 <= self.mismatch.high:
            raise ValueError(f"mismatch: low {self.mismatch.low:g} and high {self.mismatch.high:g} leave out 1, two that compute the same")
        return self

    @property
    def holds_reference(self) -> bool:
        """Whether the reference's log-probabilities are there: they pull on the policy, or cost no second model."""
        return self.kl.coefficient > 0 or self.actor_lora is not None

    @model_validator(mode="after")
    def _reference(self) -> Self:
        kl = self.kl
        if kl.where == "none" and kl.coefficient:
            raise ValueError(f"kl.coefficient is {kl.coefficient:g}, but kl.where is none: set it to answer, token or loss, or β to 0")
        if kl.where in ("answer", "token") and kl.estimator != "k1":
            raise ValueError(f"kl.estimator: in the reward only k1 has the gradient of the KL, {kl.estimator} another one")
        if kl.where != "loss" and kl.with_ratio:
            raise ValueError("kl.with_ratio is for kl.where: loss; the objective's own ratio counts for what stands in the reward")
        if kl.where == "loss" and kl.estimator == "k1" and not kl.with_ratio:
            raise ValueError("kl.estimator: as a loss k1 pulls nowhere, its gradient has mean 0: k2, k3, or with_ratio")
        if self.reference_every and not kl.coefficient:
            raise ValueError(f"reference_every moves what the policy is kept near to, but kl.where is {kl.where}, and β {kl.coefficient:g}")
        if self.reference_every and self.actor_lora:
            raise ValueError("reference_every: with actor_lora the reference is the model without adapters, and cannot move")
        return self
