"""Stage ppo: proximal policy optimisation of the sft policy against the reward model.

Four models: the actor (trained), the reference (sft, frozen), the critic (trained, from the reward model) and the reward model (frozen).
Where the actor is trained by adapters, the reference is the actor without them.
Each step: 1. rollout, 2. scoring, 3. rewards and advantages, 4. updates. The arithmetic stands in rlhf/algorithms/ppo.py; what is not its
alone, in answering.py, updates.py and records.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algorithms import ppo
from rlhf.config.training import Ppo, peak
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import check_even, gather, own_micro_batches, share, start
from rlhf.engine.order import Order
from rlhf.engine.partition import born, written
from rlhf.engine.setup import backward, settings, train_engine
from rlhf.engine.speed import Clock
from rlhf.engine.steps import Steps
from rlhf.job import Job, run
from rlhf.models import lora
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.experience import Experience, Layout, Scored
from rlhf.rollout.generate import Rollouts
from rlhf.stages import answering, stored
from rlhf.stages.answering import Models, answer_kl, answer_values, in_parts, read_prompts, read_texts, roll_out
from rlhf.stages.records import Records, Report, hand_on
from rlhf.stages.rewarding import final_rewards
from rlhf.stages.tuning import Trained, Tuning
from rlhf.stages.updates import Batch, actor_step, check_ratio, mini_batches
from rlhf.stages.updates import update as update_all
from rlhf.tensors import send


def main(job: Job) -> None:
    device = start(job)
    params = job.params.ppo
    tokenizer = load_tokenizer(job.input("models/sft"))
    check_even(params.mini_batch_size, job, "ppo.mini_batch_size")
    prompts, too_long = read_prompts(job, tokenizer)
    texts = read_texts(job, tokenizer)
    models, critic = load_models(job, tokenizer, device)
    controller = ppo.KlController(params.kl.coefficient, params.kl.controller == "adaptive", params.kl.target, params.kl.horizon)
    order = Order(len(prompts), params.rollout_batch_size, job.seed("order"))
    text_order = Order(len(texts), params.mixture_batch_size, job.seed("texts")) if texts else None

    engines = {"actor": models.actor, "critic": critic}
    state = checkpoints.load(job, engines, models.averages)
    history: list[dict[str, float]] = state.get("history", [])
    controller.beta = state.get("beta", controller.beta)
    records = Records(job, tokenizer, state.get("records_bytes", 0))
    tuning = tuning_of(job, models, critic, state.get("ultho"))
    report = Report(job, models, device, critic)

    steps = Steps(job, state["step"], params.steps, params.checkpoint_every)
    for step in steps:
        clock = Clock(device)
        picked = share(order.batch(step), job, "ppo.rollout_batch_size")
        # 1. rollout
        asked = [prompts[i] for i in picked]
        rollouts = answers(job, models, asked, step, clock)
        # 2. scores, reference log-probabilities, values: each rank its answers, then all of them on every rank
        scored = gather(score(job, models, critic, [prompt["row"] for prompt in asked], rollouts), job)
        stored.save(job, step + 1, [(prompts[i]["row"], [one]) for i, one in zip(order.batch(step), scored, strict=True)])
        experience = Experience.of(scored, device)
        clock.stop("scoring")
        # 3. rewards and advantages
        reward = final_rewards(experience.scores, experience.ended, params)
        tuned = tuning.next(step, reward.mean().item(), answer_kl(experience).mean().item())
        controller.set(tuned.params.ppo.kl.coefficient)
        targets, stats = advantages(experience, tuned.params.ppo, controller.beta)
        stats |= models.rewards.check(job, step + 1, experience.rewards, reward.tolist(), experience.ended.tolist())
        # 4. updates
        batches = mini_batches(tuned, experience, texts, text_order, step)
        stats |= update(tuned, models, critic, experience, targets, batches, step)
        clock.stop("training")
        divergence.check(job, step + 1, stats, params.stop.model_dump())
        check_ratio(job, step + 1, stats["ratio_error"])
        controller.update(stats["kl"], params.rollout_batch_size)

        history.append({"step": step + 1, **stats})
        cost = report.of(clock, experience, experience, batches[: int(stats["updates"])], actor_learns=step >= params.critic_warmup_steps)
        job.log(step + 1, params.steps, {**stats, **cost, **models.rewards.seconds()})
        records.add(step + 1, [prompts[i]["row"] for i in order.batch(step)], experience, answer_kl(experience))
        if steps.checkpoint_due(step):
            going = {"history": history, "beta": controller.beta, "records_bytes": records.bytes, "ultho": tuning.state()}
            checkpoints.save(job, step + 1, engines, going, stats["reward"], models.averages)

    hand_on(job, models, records)
    if job.is_main:
        job.write_metrics({**history[-1], "prompts": len(prompts), "too_long": too_long, **lora.share(models.adapters)})
        job.write_plot("plots/ppo.csv", history)
    tuning.write()


def load_models(job: Job, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> tuple[Models, DeepSpeedEngine]:
    """The policy with the frozen models, and the critic."""
    params = job.params.ppo
    updates = params.updates_per_step
    models = answering.load_models(job, tokenizer, device, max(1, (params.steps - params.critic_warmup_steps) * updates))
    with born(settings(job, "critic")):
        critic = load_scalar(job.input("models/reward"), tokenizer, job.params.launch.precision)
    if models.reward:
        begin_as(critic, models.reward)
    lora.attach(critic.model, params.critic_lora, "models/reward", "ppo.critic_lora", job)
    return models, train_engine(critic, peak(params.critic, params.critic_lora), job, "critic", params.steps * updates)


@torch.no_grad()
def begin_as(critic: ScalarModel, reward: ScalarModel) -> None:
    """Make of a copy of the reward model a critic that begins in the units of the normalised reward.

    Its mean has to go, too: value_clip lets a value move a little in each rollout, and until an offset is gone it stands in the advantage
    of each answer's last token, which is that of ending.
    """
    with written(critic.head.weight):
        critic.head.weight.div_(reward.std)
    critic.offset = reward.mean / reward.std


def tuning_of(job: Job, models: Models, critic: DeepSpeedEngine, state: Mapping[str, Any] | None) -> Tuning:
    params = job.params.ppo
    trained = [
        Trained(models.actor, peak(params.actor, params.actor_lora).learning_rate, params.critic_warmup_steps),
        Trained(critic, peak(params.critic, params.critic_lora).learning_rate, chosen=False),
    ]
    return Tuning(job, trained, state)


# ---------------------------------------------------------------------------------------------------------------- a step


def answers(job: Job, models: Models, asked: list[dict[str, Any]], step: int, clock: Clock) -> Rollouts:
    """An answer to each of this rank's prompts, sampled or stored."""
    if job.rollouts:
        return stored.replay(asked, [0] * len(asked), step)
    return roll_out(job, models, [prompt["ids"] for prompt in asked], answer_seeds(job, step, len(asked)), step, clock)


def answer_seeds(job: Job, step: int, count: int) -> list[int]:
    """Of this rank's answers."""
    return [job.seed("rollout", step, row * job.world_size + job.rank) for row in range(count)]


def score(job: Job, models: Models, critic: DeepSpeedEngine, rows: Sequence[Mapping[str, Any]], rollouts: Rollouts) -> list[Scored]:
    critic.eval()
    scored = answering.score(job, models, rows, rollouts, in_parts(job, rollouts), critic=critic)
    critic.train()
    return scored


@dataclass(frozen=True)
class Targets:
    """What the updates pull towards. Both (B, A)."""

    advantages: Tensor
    returns: Tensor


def advantages(e: Experience, params: Ppo, beta: float) -> tuple[Targets, dict[str, float]]:
    """Rewards, advantages and returns of the whole rollout batch; and what is logged of it."""
    final = final_rewards(e.scores, e.ended, params)
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


def update(
    job: Job,
    models: Models,
    critic: DeepSpeedEngine,
    experience: Experience,
    targets: Targets,
    batches: Sequence[Batch],
    step: int,
) -> dict[str, float]:
    """Several passes over the rollout batch, of the critic and, after its warm-up, of the actor."""
    params = job.params.ppo
    learning = ["critic", "actor"] if step >= params.critic_warmup_steps else ["critic"]

    def cut(rows: list[int]) -> list[list[int]]:
        return own_micro_batches(rows, lambda row: len(experience.sequences[row]), job, "ppo.mini_batch_size")

    def learn(rows: Sequence[int], batch: Batch, texts: list[list[int]], last: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        part = Part.of(experience, targets, rows)
        sums: dict[str, Tensor] = {}
        ratio = None
        if "actor" in learning:
            sums, ratio = actor_step(
                job, models, part.at, part.log_probs, lambda found: policy_loss(found, part, params, batch.tokens), batch, texts, last=last
            )
        return sums | critic_step(critic, part, params, batch.tokens, last=last), ratio

    return update_all(job, models, batches, {"actor": models.actor, "critic": critic}, learning, cut, learn)


def policy_loss(log_probs: Tensor, part: Part, params: Ppo, tokens: float) -> ppo.LossStats:
    return ppo.policy_loss(log_probs, part.log_probs, part.advantages, part.mask, params.policy_clip, params.dual_clip, tokens)


def critic_step(critic: DeepSpeedEngine, part: Part, params: Ppo, tokens: float, *, last: bool) -> dict[str, Tensor]:
    values = answer_values(critic, part.at)
    value = ppo.value_loss(values, part.values, part.returns, part.mask, params.value_clip, tokens)
    backward(critic, value.loss, last=last)
    return {"value_loss": value.loss, **value.sums}


if __name__ == "__main__":
    run("ppo", main)
