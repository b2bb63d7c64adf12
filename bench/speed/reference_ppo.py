"""A PPO step computed the way DeepSpeed-Chat does: what bench/speed/ppo_step.py measures stage ppo against.

The algorithm is the stage's own, from rlhf/algorithms/ppo.py. What differs is how much is computed for it:

    1. prompts are padded on the left to the longest, and transformers' `generate` goes on to the end of the longest answer
    2. actor, reference, critic and reward model each make a forward pass over the whole padded batch, the first two with all logits
    3. rewards and advantages of each token
    4. actor and critic train on padded rows, the actor with logits at every position, prompt and padding included

In half precision weights are held in fp32 beside it, and losses are fp32. What could make it slower without need is left out: no engine
around the models, torch's fused AdamW, prompts padded to the longest of the batch and not to a fixed width, one batch of all rows for
generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from bench.speed.workload import load_plain
from rlhf.algorithms import ppo
from rlhf.config.training import Optimizer, Ppo
from rlhf.job import Job
from rlhf.models.packed import pad_rows
from rlhf.models.scalar import ScalarModel
from rlhf.tensors import mask_from_lengths


@dataclass(frozen=True)
class Models:
    actor: PreTrainedModel
    critic: ScalarModel
    reference: PreTrainedModel
    reward: ScalarModel
    optimizers: tuple[Stepping, Stepping]  # of actor and critic
    pad_id: int


def load(job: Job, tokenizer: Any) -> Models:
    """The models that stage ppo starts from."""
    precision = job.params.launch.precision
    actor, reference = (load_plain(job.input("models/sft"), precision) for _ in range(2))
    folder = job.input("models/reward")
    critic, reward = (ScalarModel(load_plain(folder, precision, AutoModelForSequenceClassification)) for _ in range(2))
    with torch.no_grad():
        critic.head.weight.div_(reward.std)
    for model in (reference, reward):
        model.eval().requires_grad_(False)
    optimizers = Stepping(actor, job.params.ppo.actor), Stepping(critic, job.params.ppo.critic)
    return Models(actor, critic, reference, reward, optimizers, tokenizer.pad_token_id)


class Stepping:
    """torch's AdamW on the weights, in half precision on fp32 copies of them."""

    def __init__(self, model: torch.nn.Module, params: Optimizer) -> None:
        self.weights = list(model.parameters())
        self.largest_norm = params.max_grad_norm
        self.whole = [weight.detach().float().requires_grad_() if weight.dtype != torch.float32 else weight for weight in self.weights]
        self.optimizer = torch.optim.AdamW(
            self.whole, lr=params.learning_rate, betas=params.betas, eps=params.epsilon, weight_decay=params.weight_decay, fused=True
        )

    @torch.no_grad()
    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.weights, self.largest_norm)
        copied = [(weight, whole) for weight, whole in zip(self.weights, self.whole, strict=True) if weight is not whole]
        for weight, whole in copied:
            whole.grad = weight.grad.float() if weight.grad is not None else None
        self.optimizer.step()
        for weight, whole in copied:
            weight.copy_(whole)
            weight.grad = None
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Batch:
    """Padded prompts and answers: B rows, P columns of prompts, A of answers, T = P + A."""

    ids: Tensor  # (B, T)
    attention: Tensor  # (B, T) 1 on tokens, 0 on padding
    mask: Tensor  # (B, A) 1 on answer tokens

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Tensor, lengths: Sequence[int], pad_id: int) -> Batch:
        """Of prompts and answers (B, A), whose tokens beyond `lengths` do not count."""
        ids, attention = left_padded(prompts, pad_id)
        mask = mask_from_lengths(torch.tensor(lengths), answers.shape[1])
        return cls(torch.cat([ids, answers], 1), torch.cat([attention, mask.long()], 1), mask)

    def rows(self, index: list[int]) -> Batch:
        return Batch(self.ids[index], self.attention[index], self.mask[index])

    @property
    def first(self) -> int:
        """The column in which the answers begin."""
        return self.ids.shape[1] - self.mask.shape[1]


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, P)."""
    ids = pad_rows([prompt[::-1] for prompt in prompts], pad_id).flip(1)
    width = torch.full((len(prompts),), ids.shape[1])
    return ids, mask_from_lengths(width, ids.shape[1], start=width - torch.tensor([len(prompt) for prompt in prompts])).long()


class Planned(StoppingCriteria):
    """Each row ends at its planned column."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends  # (B,) prompt included

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Tensor:
        return self.ends <= input_ids.shape[1]


def generate(model: Any, prompts: Sequence[list[int]], lengths: Sequence[int], pad_id: int) -> Tensor:
    """Sampled answers (B, A) of planned lengths, by transformers: at temperature 1 among all tokens."""
    ids, attention = (part.to(model.device) for part in left_padded(prompts, pad_id))
    width = ids.shape[1]
    made = model.generate(
        ids,
        attention_mask=attention,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(lengths),
        eos_token_id=None,
        pad_token_id=pad_id,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([Planned(width + torch.tensor(lengths, device=model.device))]),
    )
    return made[:, width:]


@dataclass(frozen=True)
class Experience:
    """What the models say of a batch."""

    log_probs: Tensor  # (B, A)
    reference_log_probs: Tensor  # (B, A)
    values: Tensor  # (B, A)
    scores: Tensor  # (B,)
    advantages: Tensor  # (B, A)
    returns: Tensor  # (B, A)


@torch.no_grad()
def experience(models: Models, batch: Batch, params: Ppo, beta: float) -> Experience:
    old, reference = log_probs(models.actor, batch), log_probs(models.reference, batch)
    before, scores = values(models.critic, batch), score(models.reward, batch)
    kl = ppo.kl_estimate(old, reference, params.kl.estimator) * batch.mask
    rewards = ppo.token_rewards(kl, scores.clamp(-params.reward_clip, params.reward_clip), batch.mask, beta)
    advantages, returns = ppo.gae(rewards, before, batch.mask, params.gamma, params.gae_lambda)
    return Experience(old, reference, before, scores, ppo.whiten(advantages, batch.mask), returns)


def log_probs(model: Any, batch: Batch) -> Tensor:
    """(B, A), from logits (B, T, V) of every token."""
    logits = model(input_ids=batch.ids, attention_mask=batch.attention).logits
    every = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    return every[:, batch.first - 1 :] * batch.mask


def values(critic: ScalarModel, batch: Batch) -> Tensor:
    """V(s) before each answer token (B, A)."""
    return _of_tokens(critic, batch)[:, batch.first - 1 : -1] * batch.mask


def score(reward: ScalarModel, batch: Batch) -> Tensor:
    """At each answer's last token (B,), normalised."""
    last = batch.first + batch.mask.sum(1).long() - 1
    return (_of_tokens(reward, batch).gather(1, last[:, None]).squeeze(1) - reward.mean) / reward.std


def _of_tokens(model: ScalarModel, batch: Batch) -> Tensor:
    return model(input_ids=batch.ids, attention_mask=batch.attention).view(batch.ids.shape)


def update(models: Models, batch: Batch, e: Experience, mini_batches: Iterable[list[int]], params: Ppo) -> dict[str, float]:
    """One optimiser step of actor and critic for each mini-batch; the means of their losses."""
    losses: dict[str, list[float]] = {"policy_loss": [], "value_loss": []}
    for index in mini_batches:
        part = batch.rows(index)
        tokens = part.mask.sum().item()
        actor = ppo.policy_loss(
            log_probs(models.actor, part), e.log_probs[index], e.advantages[index], part.mask, params.policy_clip, params.dual_clip, tokens
        )
        critic = ppo.value_loss(values(models.critic, part), e.values[index], e.returns[index], part.mask, params.value_clip, tokens)
        for loss, stepping in zip((actor.loss, critic.loss), models.optimizers, strict=True):
            loss.backward()
            stepping.step()
        losses["policy_loss"].append(actor.loss.item())
        losses["value_loss"].append(critic.loss.item())
    return {name: sum(found) / len(found) for name, found in losses.items()}
