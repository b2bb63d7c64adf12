"""Sections base, sft, reward, ppo, dpo and evaluate (grpo: group.py): how the models are trained and measured."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rlhf.config import ultho
from rlhf.config.section import Fraction, NonNegative, PathText, Positive, Section, Temperature
from rlhf.config.ultho import Ultho


class Optimizer(Section):
    """AdamW with linear warm-up, then a schedule."""

    learning_rate: Positive = Field(description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(description="course of the learning rate after warm-up, down to final_ratio")
    final_ratio: Fraction = Field(description="last learning rate as a share of the peak (linear and cosine)")
    warmup_ratio: Fraction = Field(description="share of the steps over which the learning rate rises from 0")
    betas: tuple[Fraction, Fraction] = Field(
        strict=False,  # YAML has lists
        description="Adam's β1 and β2",
    )
    epsilon: Positive = Field(description="Adam's ε")
    weight_decay: NonNegative = Field(description="decoupled weight decay, on matrices only")
    max_grad_norm: Positive = Field(description="gradients are scaled down to this global norm")


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685). All other weights stay frozen, save the head of a reward model or critic."""

    rank: PositiveInt = Field(description="rank of each adapter")
    alpha: Positive = Field(description="an adapter's output is scaled by alpha / rank")
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        description="names of the layers that get an adapter, for example [q_proj, v_proj]; all-linear: every linear layer but the output"
    )
    learning_rate: Positive = Field(description="peak learning rate, instead of the optimiser's")


def peak(optimizer: Optimizer, lora: Lora | None) -> Optimizer:
    """The optimiser's settings for a model that is trained with or without adapters."""
    return optimizer.model_copy(update={"learning_rate": lora.learning_rate}) if lora else optimizer


class BuiltBase(Section):
    """A small Llama (grouped-query attention) with its own byte-level BPE tokenizer, pretrained here on the text slice."""

    source: Literal["build"]
    vocab_size: Annotated[int, Field(ge=300)] = Field(description="tokens of the BPE vocabulary, special tokens included")
    hidden_size: PositiveInt = Field(description="width of the model")
    intermediate_size: PositiveInt = Field(description="width of the feed-forward layers")
    layers: PositiveInt = Field(description="number of transformer layers")
    heads: PositiveInt = Field(description="attention heads (queries)")
    kv_heads: PositiveInt = Field(description="attention heads of keys and values; divides heads")
    max_tokens: PositiveInt = Field(description="length of the packed pretraining sequences, in tokens")
    context_tokens: PositiveInt = Field(description="longest sequence that the model takes (position embeddings)")
    epochs: Positive = Field(description="passes over the text slice")
    batch_size: PositiveInt = Field(description="packed sequences per optimiser step, over all processes")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")

    @model_validator(mode="after")
    def _heads(self) -> BuiltBase:
        if self.heads % self.kv_heads or self.hidden_size % self.heads:
            raise ValueError(
                f"heads ({self.heads}) must divide hidden_size ({self.hidden_size}) and be a multiple of kv_heads ({self.kv_heads})"
            )
        return self


class PretrainedBase(Section):
    """A given model, pinned: every later stage reads the copy in models/base."""

    source: Literal["pretrained"]
    model: PathText = Field(description="folder of a Hugging Face model, or a hub id")
    revision: str | None = Field(description="commit or tag of the hub model; null for a folder")
    trust_remote_code: bool = Field(
        description="run Python code that comes with the model's tokenizer, once, to pin it; leave off unless you have read that code"
    )
    chat_template: Literal["keep", "turns"] = Field(
        description="keep: the tokenizer's own chat template (required then); turns: the project's plain Human/Assistant template"
    )


Base = Annotated[BuiltBase | PretrainedBase, Field(discriminator="source")]


class Sft(Section):
    epochs: Positive = Field(description="passes over the demonstrations, each in a fresh order")
    batch_size: PositiveInt = Field(description="dialogues per optimiser step, over all processes")
    max_tokens: PositiveInt = Field(description="longer dialogues are left out and counted")
    loss_on: Literal["assistant", "all"] = Field(
        description="assistant: the loss counts the assistant's tokens and their ends; all: the prompts' tokens, too, but "
        "not in a dialogue some of whose turns are marked as not to be learnt"
    )
    group_by_length: bool = Field(
        description="dialogues of similar length share a batch: other ones each epoch, the batches in random order"
    )
    lora: Lora | None = Field(description="adapters; null: all weights are trained")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")


class Reward(Section):
    epochs: Positive = Field(description="passes over the pairs, each in a fresh order")
    batch_size: PositiveInt = Field(description="pairs per optimiser step, over all processes")
    max_tokens: PositiveInt = Field(description="pairs with a longer side are left out and counted")
    group_by_length: bool = Field(description="pairs of similar length share a batch: other ones each epoch, the batches in random order")
    lora: Lora | None = Field(description="adapters; null: all weights are trained")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")


class Kl(Section):
    """The penalty that keeps the policy near sft."""

    coefficient: NonNegative = Field(description="β of the token reward −β·KL; the first value under the adaptive controller")
    controller: Literal["fixed", "adaptive"] = Field(description="adaptive: β follows the measured KL (arXiv 1909.08593, section 2.2)")
    target: Positive = Field(description="adaptive: KL per answer, in nats, that β steers to")
    horizon: PositiveInt = Field(description="adaptive: answers over which β reacts")
    estimator: Literal["k1", "k2", "k3"] = Field(description="per-token KL estimator in the reward (Schulman 2020)")


class Stop(Section):
    """A run that leaves these bounds has diverged: the stage stops with an error, and its last checkpoint is kept."""

    kl: Positive = Field(description="KL to the reference, mean per answer in nats")
    score: Positive = Field(
        description="mean score, the sum over section rewards, up or down; a reward model's counts in standard deviations of its held-out "
        "scores"
    )


class Lengths(Section):
    """How long prompts and answers may be, and what an answer gets that was cut off."""

    max_prompt_tokens: PositiveInt = Field(description="longer prompts are left out and counted")
    max_answer_tokens: PositiveInt = Field(description="an answer is cut off here if it has not ended by itself")
    no_eos_reward: float | None = Field(
        description="reward of an answer that was cut off, whatever it says; null: that of the answer as if it had ended there, less "
        "`missing_eos_penalty`"
    )
    missing_eos_penalty: NonNegative = Field(description="what an answer that was cut off loses, where no_eos_reward is null")

    @model_validator(mode="after")
    def _penalty_counts(self) -> Self:
        if self.missing_eos_penalty and self.no_eos_reward is not None:
            raise ValueError("missing_eos_penalty counts only where no_eos_reward is null: set it to 0, or no_eos_reward to null")
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest answer and the end token, at which a reward model judges it."""
        return self.max_prompt_tokens + self.max_answer_tokens + 1


class Answering(Lengths):
    """What a policy is trained with on its own answers, whatever the algorithm."""

    steps: PositiveInt = Field(description="rollout batches, each followed by `epochs` passes of updates")
    rollout_batch_size: PositiveInt = Field(description="answers per rollout, over all processes")
    mini_batch_size: PositiveInt = Field(description="answers per optimiser step, over all processes; divides rollout_batch_size")
    epochs: PositiveInt = Field(description="passes over each rollout batch")
    temperature: Temperature = Field(description="sampling temperature; log-probabilities are divided by it everywhere")
    top_k: Annotated[int, Field(ge=0)] = Field(description="sample among the k likeliest tokens; 0: all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(description="sample in the nucleus of this mass; 1: all")
    reward_clip: Positive = Field(
        description="an answer's score, the sum over section rewards, is clipped to ± this; a reward model's counts in its standard "
        "deviations"
    )
    policy_clip: tuple[Fraction, Positive] = Field(
        strict=False,
        description="how far the ratio may fall below and rise above 1 before its gradient is cut; equal in PPO, wider upwards in DAPO",
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        description="bound of the ratio for tokens with a negative advantage; null: none"
    )
    entropy_coefficient: NonNegative = Field(description="weight of the entropy bonus; 0: off")
    max_approx_kl: Positive = Field(description="updates on a rollout stop once the policy moved this far from it (nats per token)")
    mixture_coefficient: NonNegative = Field(description="weight of the next-token loss on plain text (PPO-ptx); 0: off")
    mixture_batch_size: PositiveInt = Field(description="passages per optimiser step of the mixture loss, over all processes")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="share of its old value that an fp32 moving average of the policy keeps at each update; the stage then hands on the "
        "average; null: off"
    )
    actor: Optimizer
    actor_lora: Lora | None = Field(
        description="adapters; the actor without them is then the reference policy; null: all weights are trained"
    )
    stop: Stop
    ultho: Ultho | None = Field(description="values that are chosen while the stage learns; null: all stay as they stand here")
    checkpoint_every: PositiveInt = Field(description="steps between checkpoints")

    @property
    def updates_per_step(self) -> int:
        return self.epochs * (self.rollout_batch_size // self.mini_batch_size)

    @model_validator(mode="after")
    def _batches(self) -> Self:
        if self.rollout_batch_size % self.mini_batch_size:
            raise ValueError(f"mini_batch_size ({self.mini_batch_size}) must divide rollout_batch_size ({self.rollout_batch_size})")
        return self

    @model_validator(mode="after")
    def _ultho(self) -> Self:
        if self.ultho:
            ultho.check(self)
        return self


class Ppo(Answering):
    """Proximal policy optimisation against the reward model, with a critic (arXiv 1707.06347), where `algorithm` is ppo."""

    kl: Kl
    gamma: Fraction = Field(description="discount γ of GAE")
    gae_lambda: Fraction = Field(description="λ of GAE")
    whiten_advantages: bool = Field(description="scale advantages to mean 0, std 1 over the valid tokens of the global rollout batch")
    value_clip: Positive | None = Field(description="range in which a new value may move from the old one; null: any")
    critic_warmup_steps: Annotated[int, Field(ge=0)] = Field(description="first steps in which only the critic learns")
    critic: Optimizer
    critic_lora: Lora | None = Field(description="adapters of the critic; null: all weights are trained")


class Preference(Section):
    """Direct preference optimisation on pairs, wherever they come from."""

    epochs: Positive = Field(description="passes over the pairs, each in a fresh order")
    batch_size: PositiveInt = Field(description="pairs per optimiser step, over all processes")
    loss: Literal["sigmoid", "ipo"] = Field(description="sigmoid: DPO; ipo: a squared distance from 1 / (2·beta), arXiv 2310.12036")
    beta: Positive = Field(description="strength of the pull towards the reference policy")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        description="share of labels taken to be wrong (conservative DPO, sigmoid only); 0: off"
    )
    lora: Lora | None = Field(description="adapters; null: all weights are trained")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")

    @model_validator(mode="after")
    def _smoothing(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, but loss ipo has none: set it to 0")
        return self


class Dpo(Preference):
    """Direct preference optimisation of sft's policy (arXiv 2305.18290), where `algorithm` is dpo."""

    max_tokens: PositiveInt = Field(description="pairs with a longer side are left out and counted")
    reference: Literal["live", "precomputed", "none"] = Field(
        description="log-probabilities of sft's policy: live, by a frozen copy (with lora: adapters off) at each step; precomputed, once "
        "before training; none, taken as 0 (reference-free)"
    )


class Evaluate(Section):
    prompts: PositiveInt = Field(description="at most so many held-out prompts are answered by each model")
    answers: PositiveInt = Field(
        description="answers to each of them where a reward function tells right from wrong (right_from): accuracy, pass@k and majority "
        "are of so many; all else is measured on the first"
    )
    pairs: PositiveInt = Field(description="at most so many held-out pairs test the reward model (dpo: its implicit reward)")
    texts: PositiveInt = Field(description="at most so many held-out passages measure perplexity")
    temperature: Temperature = Field(description="sampling temperature of the answers compared")
    bootstrap_samples: PositiveInt = Field(description="resamples of the 95% intervals")
    shown: PositiveInt = Field(description="prompts shown with both answers")
    judge: Reward = Field(description="training of the second reward model that judges where there is no gold score")
