"""Stage ppo: proximal policy optimisation of the sft policy against the reward model.

Four models: the actor (trained), the reference (sft, frozen), the critic (trained, from the reward model) and the reward model (frozen).
Each step: 1. rollout, 2. scoring, 3. rewards and advantages, 4. updates. The arithmetic stands in rlhf/algorithms/ppo.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.algorithms import ppo
from rlhf.algorithms.language_model import next_token_loss
from rlhf.config import Ppo
from rlhf.data.batches import Order, Packed, decode_answer, encode_prompt, pack, pad_rows
from rlhf.engine import checkpoints
from rlhf.engine.distributed import check_even, gather, layout, micro_batches, share, start, sum_over_ranks
from rlhf.engine.setup import backward, train_engine
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run, write_lines
from rlhf.models.policy import load_policy, save_model
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.generate import Rollouts, Sampling, generate
from rlhf.tensors import entropy, mask_from_lengths, token_log_probs


@dataclass
class Experience:
    """One rank's share of a rollout batch, scored. B answers, A positions of the longest answer."""

    sequences: list[list[int]]  # B: prompt and answer
    prompt_lengths: Tensor  # (B,)
    mask: Tensor  # (B, A) 1 on answer tokens, end token included
    log_probs: Tensor  # (B, A) under the policy that sampled
    reference_log_probs: Tensor  # (B, A)
    values: Tensor  # (B, A) V(s) before each answer token
    scores: Tensor  # (B,) reward model, normalised
    ended: Tensor  # (B,) whether the answer ended by itself
    advantages: Tensor  # (B, A)
    returns: Tensor  # (B, A)

    def rows(self, index: list[int]) -> Experience:
        """Some of the rows."""
        tensors = {name: value[index] for name, value in vars(self).items() if name != "sequences"}
        return Experience([self.sequences[i] for i in index], **tensors)


@dataclass(frozen=True)
class Answers:
    """Experience laid out for a forward pass: packed rows, and where each answer token's prediction stands in them."""

    packed: Packed
    before: Tensor  # (N,) flat index of the token before each answer token; its output predicts it
    targets: Tensor  # (N,) the answer tokens
    valid: Tensor  # (B, A) bool: which cells the N tokens fill, row by row

    def fill(self, values: Tensor) -> Tensor:
        """One number per answer token (N,) → (B, A), 0 beyond each answer's end."""
        cells = torch.zeros(self.valid.shape, device=values.device)
        cells[self.valid] = values
        return cells


def lay_out(part: Experience, pad_id: int) -> Answers:
    packed = pack(part.sequences, pad_id, part.mask.device)
    valid = part.mask.bool()
    steps = torch.arange(part.mask.shape[1], device=part.mask.device)
    before = ((packed.starts + part.prompt_lengths - 1)[:, None] + steps)[valid]
    return Answers(packed, before, packed.ids.flatten()[before + 1], valid)


@dataclass
class Models:
    actor: DeepSpeedEngine
    critic: DeepSpeedEngine
    reference: PreTrainedModel
    reward: ScalarModel
    tokenizer: PreTrainedTokenizerBase


def main(job: Job) -> None:
    device = start(job)
    params = job.params.ppo
    tokenizer = load_tokenizer(job.input("models/sft"))
    check_even(params.mini_batch_size, job, "ppo.mini_batch_size")
    prompts, too_long = read_prompts(job, tokenizer)
    texts = read_texts(job, tokenizer) if params.mixture_coefficient else []
    models = load_models(job, tokenizer, device)
    controller = ppo.KlController(params.kl.coefficient, params.kl.controller == "adaptive", params.kl.target, params.kl.horizon)
    order = Order(len(prompts), params.rollout_batch_size, job.seed("order"))
    text_order = Order(len(texts), params.mixture_batch_size, job.seed("texts")) if texts else None

    engines = {"actor": models.actor, "critic": models.critic}
    state = checkpoints.load(job, engines)
    history: list[dict[str, float]] = state.get("history", [])
    controller.beta = state.get("beta", controller.beta)
    records = [row for row in read_lines(job.folder / "rollouts.jsonl") if row["step"] <= state["step"]] if state["step"] else []

    for step in range(state["step"], params.steps):
        clock = Clock()
        picked = share(order.batch(step), job, "ppo.rollout_batch_size")
        # 1. rollout
        rollouts = roll_out(job, models, [prompts[i]["ids"] for i in picked], step)
        clock.stop("generation")
        # 2. scores, reference log-probabilities, values
        experience = score(job, models, rollouts)
        clock.stop("scoring")
        # 3. rewards and advantages
        stats = advantages(experience, params, controller.beta, device)
        # 4. updates
        passages = mixture_batches(params, texts, text_order, step) if text_order else []
        stats |= update(job, models, experience, passages, step)
        clock.stop("training")
        controller.update(stats["kl"], params.rollout_batch_size)

        tokens = stats.pop("tokens")
        history.append({"step": step + 1, **stats})
        job.log(step + 1, params.steps, {**stats, **clock.report(tokens)})
        mine = [
            {"step": step + 1, **prompts[i]["row"], "answer": decode_answer(tokenizer, answer), "kl": kl, "score": value}
            for i, answer, kl, value in zip(picked, rollouts.answers, answer_kl(experience), experience.scores.tolist(), strict=True)
        ]
        records += gather(mine, job)
        if (step + 1) % params.checkpoint_every == 0 and step + 1 < params.steps:
            if job.is_main:
                write_lines(job.folder / "rollouts.jsonl", records)
            checkpoints.save(job, step + 1, engines, {"history": history, "beta": controller.beta})

    if job.is_main:
        save_model(models.actor.module, tokenizer, job.output("models/ppo"))
        write_lines(job.output("data/rollouts.jsonl"), records)
        job.write_metrics({**history[-1], "prompts": len(prompts), "too_long": too_long})
        job.write_plot("plots/ppo.csv", history)


# ---------------------------------------------------------------------------------------------------------------- set-up


def read_prompts(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], int]:
    """The prompts as token ids, and how many were left out as too long.

    Raises:
        UserError: none fits.
    """
    rows = read_lines(job.input("data/prepared/ppo.jsonl"))
    encoded = [{"row": row, "ids": encode_prompt(tokenizer, row["prompt"])} for row in rows]
    fitting = [row for row in encoded if len(row["ids"]) <= job.params.ppo.max_prompt_tokens]
    if not fitting:
        raise UserError(
            f"ppo.max_prompt_tokens: none of {len(rows)} prompts fits in {job.params.ppo.max_prompt_tokens} tokens", remedy="raise it"
        )
    return fitting, len(rows) - len(fitting)


def read_texts(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    width = job.params.ppo.max_prompt_tokens + job.params.ppo.max_answer_tokens
    texts = [row["text"] for row in read_lines(job.input("data/prepared/text.jsonl"))]
    return [[*ids, tokenizer.eos_token_id][:width] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def mixture_batches(params: Ppo, texts: list[list[int]], order: Order, step: int) -> list[list[list[int]]]:
    """The passages of each update of a step."""
    updates = updates_per_step(params)
    return [[texts[i] for i in order.batch(step * updates + update)] for update in range(updates)]


def updates_per_step(params: Ppo) -> int:
    return params.epochs * (params.rollout_batch_size // params.mini_batch_size)


def load_models(job: Job, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Models:
    params, precision = job.params.ppo, job.params.launch.precision
    updates = params.steps * updates_per_step(params)
    warmup = params.critic_warmup_steps * updates_per_step(params)
    reference = load_policy(job.input("models/sft"), precision).eval().requires_grad_(False).to(device)
    reward = load_scalar(job.input("models/reward"), tokenizer, precision).eval().requires_grad_(False).to(device)
    critic = load_scalar(job.input("models/reward"), tokenizer, precision)
    with torch.no_grad():
        critic.head.weight.div_(reward.std)  # in the units of the normalised reward
    actor = load_policy(job.input("models/sft"), precision)
    return Models(
        actor=train_engine(actor, params.actor, job, params.mini_batch_size, max(1, updates - warmup)),
        critic=train_engine(critic, params.critic, job, params.mini_batch_size, updates),
        reference=reference,
        reward=reward,
        tokenizer=tokenizer,
    )


# ---------------------------------------------------------------------------------------------------------------- a step


def roll_out(job: Job, models: Models, prompts: list[list[int]], step: int) -> Rollouts:
    params = job.params.ppo
    sampling = Sampling(params.temperature, params.top_k, params.top_p, params.max_answer_tokens)
    seeds = [job.seed("rollout", step, row * job.world_size + job.rank) for row in range(len(prompts))]
    ids = {"eos_id": models.tokenizer.eos_token_id, "pad_id": models.tokenizer.pad_token_id}
    return generate(models.actor.module, prompts, seeds, sampling, **ids, policy_version=step)


@torch.no_grad()
def score(job: Job, models: Models, rollouts: Rollouts) -> Experience:
    """Score every answer with the frozen models and the critic."""
    params, device = job.params.ppo, models.actor.device
    log_probs = pad_rows(rollouts.log_probs, 0.0, device)
    lengths = torch.tensor([len(answer) for answer in rollouts.answers], device=device)
    empty = torch.zeros_like(log_probs)
    experience = Experience(
        sequences=[prompt + answer for prompt, answer in zip(rollouts.prompts, rollouts.answers, strict=True)],
        prompt_lengths=torch.tensor([len(prompt) for prompt in rollouts.prompts], device=device),
        mask=mask_from_lengths(lengths, log_probs.shape[1]),
        log_probs=log_probs,
        reference_log_probs=empty.clone(),
        values=empty.clone(),
        scores=torch.zeros(len(lengths), device=device),
        ended=torch.tensor(rollouts.ended, device=device),
        advantages=empty,
        returns=empty,
    )
    models.critic.eval()
    for index in micro_batches(range(len(lengths)), layout(job).micro_batch_size):
        at = lay_out(experience.rows(index), models.tokenizer.pad_token_id)
        experience.reference_log_probs[index] = answer_log_probs(models.reference, at, params.temperature)[0]
        experience.values[index] = answer_values(models.critic, at)
        raw = models.reward(**at.packed.inputs)[at.packed.last]
        experience.scores[index] = (raw - models.reward.mean) / models.reward.std
        if job.params.launch.precision != "fp32":
            # decoding and training round differently in half precision, and the ratio must start at 1
            experience.log_probs[index] = answer_log_probs(models.actor.module, at, params.temperature)[0]
    models.critic.train()
    return experience


def answer_log_probs(model: Any, at: Answers, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token (B, A), 0 beyond the end; and the entropy summed over the tokens."""
    logits = model(**at.packed.inputs).logits.flatten(0, 1)[at.before]
    return at.fill(token_log_probs(logits, at.targets, temperature)), entropy(logits.detach(), temperature).sum()


def answer_values(critic: Any, at: Answers) -> Tensor:
    return at.fill(critic(**at.packed.inputs)[at.before])


def answer_kl(experience: Experience) -> list[float]:
    return ((experience.log_probs - experience.reference_log_probs) * experience.mask).sum(-1).tolist()


def advantages(experience: Experience, params: Ppo, beta: float, device: torch.device) -> dict[str, float]:
    """Fill in advantages and returns; whitening constants are those of the global batch. Returns what is logged of the rollout."""
    e = experience
    clipped = e.scores.clamp(-params.reward_clip, params.reward_clip)
    final = torch.where(e.ended, clipped, torch.full_like(clipped, params.no_eos_reward))
    kl = ppo.kl_estimate(e.log_probs, e.reference_log_probs, params.kl.estimator) * e.mask
    rewards = ppo.token_rewards(kl, final, e.mask, beta)
    e.advantages, e.returns = ppo.gae(rewards, e.values, e.mask, params.gamma, params.gae_lambda)
    residual = (e.returns - e.values) * e.mask
    sums = sum_over_ranks(
        {
            "answers": len(e.scores),
            "tokens": e.mask.sum().item(),
            "score": e.scores.sum().item(),
            "reward": final.sum().item(),
            "total_reward": rewards.sum().item(),
            "kl": sum(answer_kl(e)),
            "ended": e.ended.sum().item(),
            "advantage": e.advantages.sum().item(),
            "advantage_squared": (e.advantages.double() ** 2).sum().item(),
            "returns": (e.returns * e.mask).sum().item(),
            "returns_squared": (e.returns.double() ** 2 * e.mask).sum().item(),
            "residual": residual.sum().item(),
            "residual_squared": (residual.double() ** 2).sum().item(),
        },
        device,
    )
    answers, tokens = sums["answers"], sums["tokens"]

    def variance(name: str) -> float:
        return max(0.0, sums[f"{name}_squared"] / tokens - (sums[name] / tokens) ** 2)

    if params.whiten_advantages:
        e.advantages = ppo.whiten(e.advantages, e.mask, sums["advantage"] / tokens, variance("advantage") ** 0.5)
    return {
        "score": sums["score"] / answers,
        "reward": sums["reward"] / answers,
        "total_reward": sums["total_reward"] / answers,
        "kl": sums["kl"] / answers,
        "beta": beta,
        "eos_rate": sums["ended"] / answers,
        "answer_tokens": tokens / answers,
        "explained_variance": 1 - variance("residual") / max(variance("returns"), 1e-8),
        "tokens": tokens,
    }


def update(job: Job, models: Models, experience: Experience, passages: list[list[list[int]]], step: int) -> dict[str, float]:
    """Several passes over the rollout batch; stops early once the policy has moved too far from the one that sampled."""
    params, device = job.params.ppo, models.actor.device
    train_actor = step >= params.critic_warmup_steps
    totals: dict[str, float] = {}
    tokens_seen = updates = 0.0
    ratio_error, ratio_max = 0.0, 1.0
    for number, index in enumerate(mini_batches(job, len(experience.sequences), step)):
        mini = experience.rows(index)
        tokens = sum_over_ranks({"tokens": mini.mask.sum().item()}, device)["tokens"]
        parts = [mini.rows(rows) for rows in micro_batches(range(len(index)), layout(job).micro_batch_size)]
        texts = passages[number] if passages else []
        text_tokens = sum(len(text) - 1 for text in texts)
        sums: dict[str, float] = {}
        for i, part in enumerate(parts):
            if train_actor:
                mine = share(texts, job, "ppo.mixture_batch_size")[i :: len(parts)]
                stats, ratio = actor_step(job, models, part, tokens, mine, text_tokens)
                add(sums, stats)
                ratio_max = max(ratio_max, ratio, key=lambda value: abs(value - 1))
            add(sums, critic_step(job, models, part, tokens))
        if number == 0 and train_actor:
            ratio_error = abs(ratio_max - 1)
        means = sum_over_ranks(sums, device)
        add(totals, means)
        tokens_seen, updates = tokens_seen + tokens, updates + 1
        if means.get("approx_kl", 0.0) / tokens > params.max_approx_kl:
            break
    ratio_max = max(gather([ratio_max], job), key=lambda value: abs(value - 1))
    ratio_error = max(gather([ratio_error], job))
    losses = {name: totals.pop(name) / updates for name in list(totals) if name.endswith("loss")}
    return {
        **losses,
        **{name: value / tokens_seen for name, value in totals.items()},
        "ratio_max": ratio_max,
        "ratio_error": ratio_error,
        "updates": updates,
    }


def mini_batches(job: Job, count: int, step: int) -> Iterator[list[int]]:
    """Rows of each mini-batch of this rank: every epoch deals all of them in a fresh order."""
    size = job.params.ppo.mini_batch_size // job.world_size
    for epoch in range(job.params.ppo.epochs):
        order = list(range(count))
        job.random("mini-batches", step, epoch).shuffle(order)
        yield from micro_batches(order, size)


def add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def actor_step(
    job: Job, models: Models, part: Experience, tokens: float, texts: list[list[int]], text_tokens: int
) -> tuple[dict[str, float], float]:
    """Gradient of the policy loss, and of the mixture loss, on one micro-batch; the optimiser steps at the last one of a mini-batch.

    Args:
        tokens, text_tokens: counted tokens of the whole global mini-batch and of its mixture text.

    Returns:
        sums to log; the ratio that is furthest from 1
    """
    params, actor, pad_id = job.params.ppo, models.actor, models.tokenizer.pad_token_id
    log_probs, entropy_sum = answer_log_probs(actor, lay_out(part, pad_id), params.temperature)
    policy = ppo.policy_loss(log_probs, part.log_probs, part.advantages, part.mask, params.policy_clip, tokens)
    loss, sums = policy.loss, {"policy_loss": policy.loss.item(), "entropy": entropy_sum.item()}
    if texts:
        packed = pack(texts, pad_id, actor.device)
        counted = packed.spread([[0] + [1] * (len(text) - 1) for text in texts])
        mixture = next_token_loss(actor(**packed.inputs).logits, packed.ids, counted, text_tokens)
        loss = loss + params.mixture_coefficient * mixture
        sums["mixture_loss"] = mixture.item()
    backward(actor, loss)
    actor.step()
    ratio = ((log_probs.detach() - part.log_probs) * part.mask).exp()
    furthest = ratio.flatten()[(ratio - 1).abs().argmax()].item()
    return {**sums, **{name: value.item() for name, value in policy.sums.items()}}, furthest


def critic_step(job: Job, models: Models, part: Experience, tokens: float) -> dict[str, float]:
    values = answer_values(models.critic, lay_out(part, models.tokenizer.pad_token_id))
    value = ppo.value_loss(values, part.values, part.returns, part.mask, job.params.ppo.value_clip, tokens)
    backward(models.critic, value.loss)
    models.critic.step()
    return {"value_loss": value.loss.item(), **{name: sum_.item() for name, sum_ in value.sums.items()}}


class Clock:
    """Seconds and shares of the phases of a step."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stop(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now

    def report(self, tokens: float) -> dict[str, float]:
        total = sum(self.seconds.values())
        shares = {f"{phase}_share": seconds / total for phase, seconds in self.seconds.items()}
        speeds = {f"{phase}_tokens_per_second": tokens / self.seconds[phase] for phase in ("generation", "training")}
        return {"seconds": total, **shares, **speeds}


if __name__ == "__main__":
    run("ppo", main)
