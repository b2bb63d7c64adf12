"""What the stages that learn from their own answers share before they learn: prompts, models, rollout and scoring."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.training import Answering, peak
from rlhf.engine.distributed import equal_micro_batches
from rlhf.engine.ema import Ema
from rlhf.engine.partition import born
from rlhf.engine.setup import frozen, settings, train_engine
from rlhf.engine.speed import Clock
from rlhf.errors import UserError
from rlhf.job import Job, read_lines
from rlhf.models import lora
from rlhf.models.contents import encode_passages
from rlhf.models.dialogues import decode_answer, encode_dialogues
from rlhf.models.policy import check_length, load_policy, logits_at
from rlhf.models.scalar import ScalarModel, load_scalar, values_at
from rlhf.rollout.experience import Experience, Layout, Scored
from rlhf.rollout.generate import Rollouts, generate
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.weights import policy_weights
from rlhf.stages import stored
from rlhf.stages.rewarding import Rewards
from rlhf.tensors import token_log_probs


@dataclass
class Models:
    """The policy, and the frozen models that say something of its answers."""

    actor: DeepSpeedEngine
    reference: lora.Reference | None  # None where it pulls on nothing
    reward: ScalarModel | None  # None where no entry of section rewards is a model
    adapters: lora.Adapters | None  # of the actor
    averages: dict[str, Ema]  # of the actor: ema, where there is one
    tokenizer: PreTrainedTokenizerBase
    rewards: Rewards

    @property
    def ema(self) -> Ema | None:
        return self.averages.get("ema")

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id


def section(job: Job) -> Answering:
    """The stage's own values."""
    return getattr(job.params, job.stage)


def read_prompts(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], int]:
    """The prompts as token ids, and how many were left out as too long.

    Raises:
        UserError: none fits.
    """
    if job.rollouts:
        return stored.load(job, job.rollouts), 0
    limit = section(job).max_prompt_tokens
    rows = read_lines(job.input("data/prepared/ppo.jsonl"))
    prompts = encode_dialogues(tokenizer, (row["prompt"] for row in rows))
    encoded = [{"row": row, "ids": ids} for row, (ids, _) in zip(rows, prompts, strict=True)]
    fitting = [row for row in encoded if len(row["ids"]) <= limit]
    if not fitting:
        raise UserError(f"{job.stage}.max_prompt_tokens: none of {len(rows)} prompts fits in {limit} tokens", remedy="raise it")
    return fitting, len(rows) - len(fitting)


def read_texts(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The passages that are mixed in; none where they count nothing."""
    params = section(job)
    if not params.mixture_coefficient:
        return []
    width = params.longest
    texts = [row["text"] for row in read_lines(job.input("data/prepared/text.jsonl"))]
    return [[*ids, tokenizer.eos_token_id][:width] for ids in encode_passages(tokenizer, texts)]


def load_reward(job: Job, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> ScalarModel:
    with born(settings(job, "reward")):
        reward = load_scalar(job.input("models/reward"), tokenizer, job.params.launch.precision)
    return frozen(reward, job, "reward", device)


def load_models(job: Job, tokenizer: PreTrainedTokenizerBase, device: torch.device, updates: int, *, with_reference: bool = True) -> Models:
    """All but a critic; the actor's schedule spans so many updates."""
    params = section(job)
    reward = load_reward(job, tokenizer, device) if job.params.trains_reward else None
    with born(settings(job, "policy")):
        actor = load_policy(job.input(job.params.start), job.params.launch.precision)
    key = f"{job.stage}.max_prompt_tokens + {job.stage}.max_answer_tokens + 1"
    check_length(actor, params.longest, key)
    adapters = lora.attach(actor, params.actor_lora, job.params.start, f"{job.stage}.actor_lora", job)
    without = None if job.params.warm_starts else adapters  # without them the actor is awac's, and the reference is sft
    return Models(
        actor=train_engine(actor, peak(params.actor, params.actor_lora), job, "policy", updates),
        reference=lora.reference(without, job, job.input("models/sft"), device) if with_reference else None,
        reward=reward,
        adapters=adapters,
        averages={"ema": Ema(actor, params.ema_decay)} if params.ema_decay else {},
        tokenizer=tokenizer,
        rewards=Rewards.of(job),
    )


def sampling_of(params: Answering) -> Sampling:
    return Sampling(params.temperature, params.top_k, params.top_p, params.max_answer_tokens)


def roll_out(
    job: Job, models: Models, prompts: list[list[int]], seeds: Sequence[int], step: int, clock: Clock, sampling: Sampling | None = None
) -> Rollouts:
    """An answer to each of this rank's prompts, from the weights as they are.

    Args:
        sampling: how; None: as the stage's section says.
    """
    sampling = sampling or sampling_of(section(job))
    ids = {"eos_id": models.tokenizer.eos_token_id, "pad_id": models.pad_id}
    rollout = job.params.launch.rollout
    actor = models.actor.module
    with policy_weights(actor, rollout.gather) as together:
        clock.stop("switching")
        rollouts = generate(actor, prompts, seeds, sampling, **ids, slots=rollout.slots, policy_version=step, together=together)
        clock.stop("generation")
    clock.stop("switching")
    return rollouts


def in_parts(job: Job, rollouts: Rollouts) -> list[list[int]]:
    """Numbers of this rank's answers, by forward pass."""
    numbers = range(len(rollouts.answers))
    return equal_micro_batches(numbers, lambda i: len(rollouts.prompts[i]) + len(rollouts.answers[i]), job)


@torch.no_grad()
def score(
    job: Job,
    models: Models,
    rows: Sequence[Mapping[str, Any]],
    rollouts: Rollouts,
    parts: Iterable[list[int]],
    *,
    critic: DeepSpeedEngine | None = None,
    exact: bool = True,
) -> list[Scored]:
    """What section rewards, the reference, and the critic where there is one, say of each answer of this rank.

    Functions and services are asked meanwhile.
    Nothing is read until all forward passes have been asked for: a GPU computes one micro-batch while the next is laid out.

    Args:
        parts: numbers of the answers of each forward pass.
        exact: the rollout's log-probabilities are those of training, where it computes in fp32.
    """
    params, device = section(job), models.actor.device
    asked = models.rewards.begin(rows, [decode_answer(models.tokenizer, ids) for ids in rollouts.answers])
    # decoding and training round differently in half precision, and the ratio must start at 1
    exact = exact and job.params.launch.precision == "fp32" and job.rollouts is None
    found: list[tuple[list[int], list[Tensor]]] = []  # numbers of the answers, and what is said of them
    for index in parts:
        sequences = [rollouts.prompts[i] + rollouts.answers[i] for i in index]
        width = max(len(rollouts.answers[i]) for i in index)
        closings = closed([rollouts.ended[i] for i in index], models.tokenizer) if models.reward else None
        at = Layout.of(sequences, [len(rollouts.prompts[i]) for i in index], width, device, closings)
        scores = [model_scores(models.reward, at)] if models.reward else []
        nothing = torch.zeros(len(index), 0)
        reference = reference_log_probs(models.reference, at, params.temperature) if models.reference else nothing
        values = answer_values(critic, at) if critic else nothing
        again = [] if exact else [answer_log_probs(models.actor.module, at, params.temperature)]
        found.append((index, [reference, values, *scores, *again]))
    scored: dict[int, Scored] = {}
    outcomes = models.rewards.collect(asked)
    for index, said in found:
        reference, values, *others = (numbers.cpu() for numbers in said)
        scores, again = others[: len(scores)], others[len(scores) :]
        for row, i in enumerate(index):
            length = len(rollouts.answers[i])
            sampled = torch.tensor(rollouts.log_probs[i])
            log_probs = again[0][row, :length].clone() if again else sampled
            of_tokens = (log_probs, sampled, reference[row, :length].clone(), values[row, :length].clone())
            given = {name: of_all[i] for name, of_all in outcomes.items()}
            total, rewards = models.rewards.summed(given, [part[row].item() for part in scores])
            scored[i] = Scored(rollouts.prompts[i], rollouts.answers[i], rollouts.ended[i], total, *of_tokens, rewards)
    return [scored[i] for i in range(len(rollouts.answers))]


def closed(ended: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What is written behind answers for a reward model, which has learnt to judge at the end token: that, where one was cut off."""
    return [[] if end else [tokenizer.eos_token_id] for end in ended]


def model_scores(model: ScalarModel, at: Layout) -> Tensor:
    """The reward model's score of each answer (B,), in its own standard deviations."""
    return (values_at(model, at.packed, at.packed.last) - model.mean) / model.std


def answer_log_probs(model: Any, at: Layout, temperature: float) -> Tensor:
    """Log-probability of each answer token (B, A), 0 beyond the end."""
    return at.fill(token_log_probs(logits_at(model, at.packed, at.before), at.targets, temperature))


def reference_log_probs(reference: lora.Reference, at: Layout, temperature: float) -> Tensor:
    """The same under the reference."""
    with reference() as model:
        return answer_log_probs(model, at, temperature)


def answer_values(critic: Any, at: Layout) -> Tensor:
    return at.fill(values_at(critic, at.packed, at.before))


def answer_kl(experience: Experience) -> Tensor:
    """Σ log π(token) − log π_ref(token) over each answer (B,)."""
    return ((experience.log_probs - experience.reference_log_probs) * experience.mask).sum(-1)
