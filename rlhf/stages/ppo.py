"""Stage ppo: proximal policy optimisation of the sft policy against the reward model.

Four models: the actor (trained), the reference (sft, frozen), the critic (trained, from the reward model) and the reward model (frozen).
Where the actor is trained by adapters, the reference is the actor without them.
Each step: 1. rollout, 2. scoring, 3. rewards and advantages, 4. updates. The arithmetic stands in rlhf/algorithms/ppo.py.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms import ppo
from rlhf.algorithms.language_model import next_token_loss
from rlhf.config.training import Ppo
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import add, check_even, equal_micro_batches, gather, share, start, sum_over_ranks
from rlhf.engine.order import Order
from rlhf.engine.setup import backward, step_together
from rlhf.engine.speed import Clock
from rlhf.engine.steps import Steps
from rlhf.errors import UserError
from rlhf.job import Job, run
from rlhf.models import lora, saving
from rlhf.models.packed import pack
from rlhf.models.policy import logits_at
from rlhf.models.scalar import values_at
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.experience import Experience, Layout, Scored
from rlhf.rollout.generate import Rollouts, generate
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.weights import policy_weights
from rlhf.stages.ppo_setup import Models, Records, Report, load_models, read_prompts, read_texts, updates_per_step
from rlhf.tensors import log_probs_and_entropy, send, token_log_probs

MAX_RATIO_ERROR = 1e-3  # of the first mini-batch after a rollout, in fp32: rounding alone stays a hundred times below


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
    state = checkpoints.load(job, engines, models.ema)
    history: list[dict[str, float]] = state.get("history", [])
    controller.beta = state.get("beta", controller.beta)
    records = Records(job, tokenizer, state.get("records_bytes", 0))
    report = Report(job, models, device)

    steps = Steps(job, state["step"], params.steps, params.checkpoint_every)
    for step in steps:
        clock = Clock(device)
        picked = share(order.batch(step), job, "ppo.rollout_batch_size")
        # 1. rollout
        rollouts = roll_out(job, models, [prompts[i]["ids"] for i in picked], step, clock)
        # 2. scores, reference log-probabilities, values: each rank its answers, then all of them on every rank
        experience = Experience.of(gather(score(job, models, rollouts), job), device)
        clock.stop("scoring")
        # 3. rewards and advantages
        targets, stats = advantages(experience, params, controller.beta)
        # 4. updates
        passages = mixture_batches(params, texts, text_order, step) if text_order else []
        stats |= update(job, models, experience, targets, passages, step)
        clock.stop("training")
        divergence.check(job, step + 1, stats, params.stop.model_dump())
        check_ratio(job, step + 1, stats["ratio_error"])
        controller.update(stats["kl"], params.rollout_batch_size)

        history.append({"step": step + 1, **stats})
        done = int(stats["updates"])
        learnt = [row for index in itertools.islice(mini_batches(job, len(experience.sequences), step), done) for row in index]
        texts_learnt = [text for batch in passages[:done] for text in batch]
        cost = report.of(clock, experience, learnt, texts_learnt, actor_learns=step >= params.critic_warmup_steps)
        job.log(step + 1, params.steps, {**stats, **cost})
        records.add(step + 1, [prompts[i]["row"] for i in order.batch(step)], experience, answer_kl(experience))
        if steps.checkpoint_due(step):
            going = {"history": history, "beta": controller.beta, "records_bytes": records.bytes}
            checkpoints.save(job, step + 1, engines, going, stats["reward"], models.ema)

    if models.ema:
        models.ema.copy_to(models.actor.module)
    saving.save(job, models.actor.module, tokenizer, job.output("models/ppo"), models.adapters)
    if job.is_main:
        shutil.copyfile(records.path, job.output("data/rollouts.jsonl"))
        job.write_metrics({**history[-1], "prompts": len(prompts), "too_long": too_long, **lora.share(models.adapters)})
        job.write_plot("plots/ppo.csv", history)


# ---------------------------------------------------------------------------------------------------------------- a step


def roll_out(job: Job, models: Models, prompts: list[list[int]], step: int, clock: Clock) -> Rollouts:
    params = job.params.ppo
    sampling = Sampling(params.temperature, params.top_k, params.top_p, params.max_answer_tokens)
    seeds = [job.seed("rollout", step, row * job.world_size + job.rank) for row in range(len(prompts))]
    ids = {"eos_id": models.tokenizer.eos_token_id, "pad_id": models.pad_id}
    rollout = job.params.launch.rollout
    actor = models.actor.module
    with policy_weights(actor, rollout.gather) as together:
        clock.stop("switching")
        rollouts = generate(actor, prompts, seeds, sampling, **ids, slots=rollout.slots, policy_version=step, together=together)
        clock.stop("generation")
    clock.stop("switching")
    return rollouts


@torch.no_grad()
def score(job: Job, models: Models, rollouts: Rollouts) -> list[Scored]:
    """What the frozen models and the critic say of each answer of this rank.

    Nothing is read until all forward passes have been asked for: a GPU computes one micro-batch while the next is laid out.
    """
    params, device = job.params.ppo, models.actor.device
    # decoding and training round differently in half precision, and the ratio must start at 1
    exact = job.params.launch.precision == "fp32"
    found: list[tuple[list[int], list[Tensor]]] = []  # numbers of the answers, and what is said of them
    models.critic.eval()
    numbers = range(len(rollouts.answers))
    for index in equal_micro_batches(numbers, lambda i: len(rollouts.prompts[i]) + len(rollouts.answers[i]), job):
        sequences = [rollouts.prompts[i] + rollouts.answers[i] for i in index]
        at = Layout.of(sequences, [len(rollouts.prompts[i]) for i in index], max(len(rollouts.answers[i]) for i in index), device)
        raw = values_at(models.reward, at.packed, at.packed.last)
        with models.reference() as model:
            reference = answer_log_probs(model, at, params.temperature)
        said = [(raw - models.reward.mean) / models.reward.std, reference, answer_values(models.critic, at)]
        if not exact:
            said.append(answer_log_probs(models.actor.module, at, params.temperature))
        found.append((index, said))
    models.critic.train()
    scored: dict[int, Scored] = {}
    for index, said in found:
        scores, reference, values, *again = (numbers.cpu() for numbers in said)
        for row, i in enumerate(index):
            length = len(rollouts.answers[i])
            log_probs = again[0][row, :length].clone() if again else torch.tensor(rollouts.log_probs[i])
            of_tokens = (log_probs, reference[row, :length].clone(), values[row, :length].clone())
            scored[i] = Scored(rollouts.prompts[i], rollouts.answers[i], rollouts.ended[i], scores[row].item(), *of_tokens)
    return [scored[i] for i in numbers]


def answer_log_probs(model: Any, at: Layout, temperature: float) -> Tensor:
    """Log-probability of each answer token (B, A), 0 beyond the end."""
    return at.fill(token_log_probs(logits_at(model, at.packed, at.before), at.targets, temperature))


def answer_values(critic: Any, at: Layout) -> Tensor:
    return at.fill(values_at(critic, at.packed, at.before))


def answer_kl(experience: Experience) -> Tensor:
    """Σ log π(token) − log π_ref(token) over each answer (B,)."""
    return ((experience.log_probs - experience.reference_log_probs) * experience.mask).sum(-1)


@dataclass(frozen=True)
class Targets:
    """What the updates pull towards. Both (B, A)."""

    advantages: Tensor
    returns: Tensor


def advantages(e: Experience, params: Ppo, beta: float) -> tuple[Targets, dict[str, float]]:
    """Rewards, advantages and returns of the whole rollout batch; and what is logged of it."""
    clipped = e.scores.clamp(-params.reward_clip, params.reward_clip)
    final = torch.where(e.ended, clipped, torch.full_like(clipped, params.no_eos_reward))
    kl = ppo.kl_estimate(e.log_probs, e.reference_log_probs, params.kl.estimator) * e.mask
    rewards = ppo.token_rewards(kl, final, e.mask, beta)
    raw, returns = ppo.gae(rewards, e.values, e.mask, params.gamma, params.gae_lambda)
    valid = e.mask.bool()
    residual = (returns - e.values)[valid]
    stats = {
        "reward": final.mean(),
        "kl": answer_kl(e).mean(),
        "score": e.scores.mean(),
        "total_reward": rewards.sum(-1).mean(),
        "eos_rate": e.ended.float().mean(),
        "answer_tokens": e.mask.sum(-1).mean(),
        "advantage_std": raw[valid].std(correction=0),
        "explained_variance": 1 - residual.var(correction=0) / returns[valid].var(correction=0).clamp(min=1e-8),
    }
    told = {name: value.item() for name, value in stats.items()}  # in this order on the terminal: what decides first
    return Targets(ppo.whiten(raw, e.mask) if params.whiten_advantages else raw, returns), told | {"beta": beta}


@dataclass(frozen=True)
class Part:
    """A micro-batch of one rank."""

    at: Layout
    mask: Tensor  # this and the others (B, A)
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(cls, e: Experience, targets: Targets, index: Sequence[int]) -> Part:
        device = e.mask.device
        at = Layout.of([e.sequences[i] for i in index], [e.prompt_lengths[i] for i in index], e.mask.shape[1], device)
        rows = send(torch.tensor(index), device)
        return cls(at, e.mask[rows], e.log_probs[rows], e.values[rows], targets.advantages[rows], targets.returns[rows])


def mixture_batches(params: Ppo, texts: list[list[int]], order: Order, step: int) -> list[list[list[int]]]:
    """The passages of each update of a step."""
    updates = updates_per_step(params)
    return [[texts[i] for i in order.batch(step * updates + update)] for update in range(updates)]


def update(
    job: Job, models: Models, experience: Experience, targets: Targets, passages: list[list[list[int]]], step: int
) -> dict[str, float]:
    """Several passes over the rollout batch; stops early once the policy has moved too far from the one that sampled."""
    params = job.params.ppo
    train_actor = step >= params.critic_warmup_steps
    totals: dict[str, float] = {}
    tokens_seen = updates = 0.0
    ratio_error, ratio_max = 0.0, 1.0
    norms = {"actor_grad_norm": 0.0, "critic_grad_norm": 0.0}
    for number, index in enumerate(mini_batches(job, len(experience.sequences), step)):
        tokens = float(sum(len(experience.sequences[i]) - experience.prompt_lengths[i] for i in index))
        mine = share(index, job, "ppo.mini_batch_size")
        parts = equal_micro_batches(mine, lambda row: len(experience.sequences[row]), job)
        texts = passages[number] if passages else []
        text_tokens = sum(len(text) - 1 for text in texts)
        sums: dict[str, Tensor] = {}
        ratios: list[Tensor] = []
        for i, rows in enumerate(parts):
            part = Part.of(experience, targets, rows)
            last = i + 1 == len(parts)
            if train_actor:
                own_texts = share(texts, job, "ppo.mixture_batch_size")[i :: len(parts)]
                stats, ratio = actor_step(job, models, part, tokens, own_texts, text_tokens, last=last)
                add(sums, stats)
                ratios.append(ratio)
            add(sums, critic_step(job, models, part, tokens, last=last))
        ratio_max = max(ratio_max, *torch.stack(ratios).tolist(), key=lambda value: abs(value - 1)) if ratios else ratio_max
        trained = {"critic_grad_norm": models.critic} | ({"actor_grad_norm": models.actor} if train_actor else {})
        found = dict(zip(trained, step_together(job, list(trained.values())), strict=True))
        norms |= {name: max(norms[name], norm) for name, norm in found.items()}
        if models.ema and math.isfinite(found.get("actor_grad_norm", math.inf)):  # else there was no step: critic warm-up, or overflow
            models.ema.update(models.actor.module)
        if number == 0 and train_actor:
            ratio_error = abs(ratio_max - 1)
        means = sum_over_ranks(sums)
        for name, value in means.items():
            totals[name] = totals.get(name, 0.0) + value
        tokens_seen, updates = tokens_seen + tokens, updates + 1
        if means.get("approx_kl", 0.0) / tokens > params.max_approx_kl:
            break
    ratio_max = max(gather([ratio_max], job), key=lambda value: abs(value - 1))
    ratio_error = max(gather([ratio_error], job))
    losses = {name: totals.pop(name) / updates for name in list(totals) if name.endswith("loss")}
    return {
        **losses,
        **{name: value / tokens_seen for name, value in totals.items()},
        **norms,
        "ratio_max": ratio_max,
        "ratio_error": ratio_error,
        "updates": updates,
    }


def check_ratio(job: Job, step: int, error: float) -> None:
    """Check that the first mini-batch after a rollout found the policy that sampled it: |ratio − 1| is rounding in fp32.

    Raises:
        UserError: it is more.
    """
    if job.params.launch.precision == "fp32" and error > MAX_RATIO_ERROR:
        raise UserError(
            f"stage ppo, step {step}: training does not find the log-probabilities that the answers were sampled with: "
            f"|ratio − 1| is {error:.2g} before the first update, above {MAX_RATIO_ERROR:g}",
            remedy="this is a fault in how base.model is run, not in your data: choose another model, and report this one",
        )


def mini_batches(job: Job, count: int, step: int) -> Iterator[list[int]]:
    """Rows of each mini-batch, over all ranks: every epoch deals all of them in a fresh order."""
    for epoch in range(job.params.ppo.epochs):
        order = list(range(count))
        job.random("mini-batches", step, epoch).shuffle(order)
        size = job.params.ppo.mini_batch_size
        yield from (order[first : first + size] for first in range(0, count, size))


def actor_step(
    job: Job, models: Models, part: Part, tokens: float, texts: list[list[int]], text_tokens: int, *, last: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the policy loss, and of the mixture loss, on one micro-batch.

    Args:
        tokens, text_tokens: counted tokens of the whole global mini-batch and of its mixture text.
        last: micro-batch of the mini-batch.

    Returns:
        sums to log; the ratio that is furthest from 1
    """
    params, actor = job.params.ppo, models.actor
    logits = logits_at(actor, part.at.packed, part.at.before)
    found, entropies = log_probs_and_entropy(logits, part.at.targets, params.temperature)
    log_probs = part.at.fill(found)
    policy = ppo.policy_loss(log_probs, part.log_probs, part.advantages, part.mask, params.policy_clip, params.dual_clip, tokens)
    loss, sums = policy.loss, {"policy_loss": policy.loss, "entropy": entropies.sum()}
    if params.entropy_coefficient:
        loss = loss - params.entropy_coefficient * entropies.sum() / tokens
    if texts:
        packed = pack(texts, actor.device)
        wanted = packed.predictions([[1] * len(text) for text in texts])
        mixture = next_token_loss(logits_at(actor, packed, wanted.places), wanted.targets, text_tokens)
        loss = loss + params.mixture_coefficient * mixture
        sums["mixture_loss"] = mixture
    backward(actor, loss, last=last)
    ratio = ((log_probs.detach() - part.log_probs) * part.mask).exp()
    return {**sums, **policy.sums}, ratio.flatten()[(ratio - 1).abs().argmax()]


def critic_step(job: Job, models: Models, part: Part, tokens: float, *, last: bool) -> dict[str, Tensor]:
    values = answer_values(models.critic, part.at)
    value = ppo.value_loss(values, part.values, part.returns, part.mask, job.params.ppo.value_clip, tokens)
    backward(models.critic, value.loss, last=last)
    return {"value_loss": value.loss, **value.sums}


if __name__ == "__main__":
    run("ppo", main)
