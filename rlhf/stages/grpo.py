"""Stage grpo: policy optimisation without a critic, on several answers to each prompt, from the sft policy against section rewards.

Models: the actor (trained); where the KL counts, the reference (sft, frozen, or the actor of some steps ago); where a reward is a model,
that one (frozen). Which algorithm it is, section grpo says: baseline, scale, ratio, objective, normaliser, where the KL stands
(rlhf/config/algorithms.py has the values that each name stands for). The arithmetic stands in rlhf/algorithms/advantages.py and group.py;
what is not this stage's alone, in answering.py, rewarding.py, updates.py and records.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms import advantages as estimators
from rlhf.algorithms.group import Objective, corrections, group_loss, token_weights
from rlhf.algorithms.ppo import LossStats
from rlhf.config.group import Grpo
from rlhf.config.training import peak
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import check_even, share_tokens, sharing_micro_batches, start
from rlhf.engine.ema import Ema
from rlhf.engine.order import Order
from rlhf.engine.speed import Clock
from rlhf.engine.steps import Steps
from rlhf.job import Job, run
from rlhf.models import lora
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.experience import Experience, Layout
from rlhf.stages.answering import Models, answer_kl, load_models, read_prompts, read_texts
from rlhf.stages.groups import Collected, collect, rewards
from rlhf.stages.records import Records, Report, hand_on
from rlhf.stages.tuning import Trained, Tuning
from rlhf.stages.updates import Batch, actor_step, check_ratio, mini_batches
from rlhf.stages.updates import update as update_all
from rlhf.tensors import send


def main(job: Job) -> None:
    device, params = start(job), job.params.grpo
    tokenizer = load_tokenizer(job.input("models/sft"))
    check_even(params.mini_batch_size, job, "grpo.mini_batch_size")
    prompts, too_long = read_prompts(job, tokenizer)
    texts = read_texts(job, tokenizer)
    models = load_models(job, tokenizer, device, params.steps * params.updates_per_step, with_reference=params.holds_reference)
    if params.reference_every:
        models.averages["reference"] = Ema(models.actor.module, 0.0)
    order = Order(len(prompts), 1, job.seed("order"))
    text_order = Order(len(texts), params.mixture_batch_size, job.seed("texts")) if texts else None

    state = checkpoints.load(job, {"actor": models.actor}, models.averages)
    move_reference(models)
    history: list[dict[str, float]] = state.get("history", [])
    place = state.get("place", 0)
    records = Records(job, tokenizer, state.get("records_bytes", 0))
    report = Report(job, models, device)
    trained = [Trained(models.actor, peak(params.actor, params.actor_lora).learning_rate)]
    tuning = Tuning(job, trained, state.get("ultho"))

    steps = Steps(job, state["step"], params.steps, params.checkpoint_every)
    for step in steps:
        clock = Clock(device)
        # 1. rollout, 2. scores and reference log-probabilities: each rank its answers, then all of them on every rank
        found = collect(job, models, prompts, order, place, step, clock)
        place = found.place
        experience = Experience.of([row for group in found.groups for row in group.answers], device)
        # 3. rewards and advantages
        reward = rewards(params, [one for group in found.groups for one in group.answers])
        tuned = tuning.next(step, reward.mean().item(), answer_kl(experience).mean().item() if params.holds_reference else 0.0)
        targets, stats = advantages(experience, found, tuned.params.grpo)
        stats |= models.rewards.check(
            job, step + 1, [row.rewards for row in found.made], reward.tolist(), experience.ended.tolist(), len(found.groups)
        )
        # 4. updates
        batches = mini_batches(tuned, experience, texts, text_order, step, params.answers_per_prompt)
        stats |= update(tuned, models, experience, targets, batches)
        clock.stop("training")
        divergence.check(job, step + 1, stats, params.stop.model_dump())
        check_ratio(job, step + 1, stats["ratio_error"])

        history.append({"step": step + 1, **stats})
        cost = report.of(clock, Experience.of(found.made, device), experience, batches[: int(stats["updates"])])
        job.log(step + 1, params.steps, {**stats, **cost, **models.rewards.seconds()})
        rows = [prompts[group.prompt]["row"] for group in found.groups for _ in group.answers]
        records.add(step + 1, rows, experience, answer_kl(experience) if models.reference else None)
        if params.reference_every and (step + 1) % params.reference_every == 0:
            models.averages["reference"].update(models.actor.module)
            move_reference(models)
        if steps.checkpoint_due(step):
            going = {"history": history, "place": place, "records_bytes": records.bytes, "ultho": tuning.state()}
            checkpoints.save(job, step + 1, {"actor": models.actor}, going, stats["reward"], models.averages)

    hand_on(job, models, records)
    if job.is_main:
        counts = {"prompts": len(prompts), "too_long": too_long, "groups": place}
        counts["groups_replaced"] = int(sum(row["groups_replaced"] for row in history))
        job.write_metrics({**history[-1], **counts, **lora.share(models.adapters)})
        # dvc.yaml draws column kl, whether or not there is anything in it
        job.write_plot("plots/grpo.csv", history if models.reference else [{**row, "kl": None} for row in history])
    tuning.write()


def move_reference(models: Models) -> None:
    """Put the policy of the last time that the reference moved in its place."""
    if (anchor := models.averages.get("reference")) and models.reference:
        with models.reference() as reference:
            anchor.copy_to(reference)


# ---------------------------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Targets:
    """What the updates pull towards, and how much each token counts for another sampler's sake. Both (B, A)."""

    advantages: Tensor
    corrections: Tensor


def advantages(e: Experience, found: Collected, params: Grpo) -> tuple[Targets, dict[str, float]]:
    """Advantages of the whole rollout batch; and what is logged of it."""
    device = e.mask.device
    by_group = torch.stack([rewards(params, group.answers) for group in found.groups]).to(device)
    greedy = [rewards(params, [group.greedy])[0] if group.greedy else torch.zeros(()) for group in found.groups]
    result = estimators.advantages(
        by_group,
        torch.stack(greedy).to(device),
        e.log_probs - e.reference_log_probs if params.holds_reference else torch.zeros_like(e.mask),
        e.mask,
        baseline=params.baseline,
        scale=params.scale,
        epsilon=params.scale_epsilon,
        gamma=params.gamma,
        kl_where=params.kl.where,
        beta=params.kl.coefficient,
    )
    valid = e.mask.bool()
    mismatch = (e.log_probs - e.rollout_log_probs)[valid].abs()
    weights = corrections(e.log_probs, e.rollout_log_probs, e.mask, params.mismatch.correction, params.mismatch.low, params.mismatch.high)
    stats = {
        "reward": by_group.mean(),
        **({"kl": answer_kl(e).mean()} if params.holds_reference else {}),
        "score": e.scores.mean(),
        "reward_std": by_group.std(1, correction=0).mean(),  # within a group
        "eos_rate": e.ended.float().mean(),
        "answer_tokens": e.mask.sum(-1).mean(),
        "advantage_std": result[valid].std(correction=0),
        "equal_groups": estimators.equal(by_group).float().mean(),
        "mismatch_mean": mismatch.mean(),
        "mismatch_max": mismatch.max(),
        "left_out": (weights[valid] == 0).float().mean(),
    }
    told = {name: value.item() for name, value in stats.items()}
    return Targets(result, weights), told | {"groups_replaced": float(found.replaced)}


@dataclass(frozen=True)
class Part:
    """A micro-batch of one rank."""

    at: Layout
    mask: Tensor  # this and the others (B, A)
    log_probs: Tensor
    reference_log_probs: Tensor
    advantages: Tensor
    corrections: Tensor

    @classmethod
    def of(cls, e: Experience, targets: Targets, index: Sequence[int]) -> Part:
        device = e.mask.device
        at = Layout.of([e.sequences[i] for i in index], [e.prompt_lengths[i] for i in index], e.mask.shape[1], device)
        rows = send(torch.tensor(index), device)
        return cls(at, e.mask[rows], e.log_probs[rows], e.reference_log_probs[rows], targets.advantages[rows], targets.corrections[rows])


def update(job: Job, models: Models, e: Experience, targets: Targets, batches: Sequence[Batch]) -> dict[str, float]:
    """Several passes over the rollout batch."""
    params = job.params.grpo
    form = objective(params)

    def prompt(row: int) -> tuple[int, ...]:
        return tuple(e.sequences[row][: e.prompt_lengths[row]])

    def answer(row: int) -> int:
        return len(e.sequences[row]) - e.prompt_lengths[row]

    def cut(rows: list[int]) -> list[list[int]]:
        return sharing_micro_batches(share_tokens(rows, answer, job, "grpo.mini_batch_size", together=prompt), prompt, answer, job)

    def learn(rows: Sequence[int], batch: Batch, texts: list[list[int]], last: bool) -> tuple[dict[str, Tensor], Tensor]:
        part = Part.of(e, targets, rows)
        weights = token_weights(part.mask, params.normaliser, batch.tokens, len(batch.rows), constant(params))

        def loss(log_probs: Tensor) -> LossStats:
            given = (part.log_probs, part.reference_log_probs, part.advantages, part.mask, weights, part.corrections)
            return group_loss(log_probs, *given, form)

        return actor_step(job, models, part.at, part.log_probs, loss, batch, texts, last=last)

    return update_all(job, models, batches, {"actor": models.actor}, ["actor"], cut, learn)


def constant(params: Grpo) -> float:
    """L of normaliser `constant`."""
    return params.normaliser_tokens or params.max_answer_tokens


def objective(params: Grpo) -> Objective:
    kl = params.kl
    return Objective(
        ratio=params.ratio,
        objective=params.objective,
        policy_clip=params.policy_clip,
        dual_clip=params.dual_clip,
        ratio_cap=params.ratio_cap,
        kl_coefficient=kl.coefficient if kl.where == "loss" else 0.0,
        kl_estimator=kl.estimator,
        kl_with_ratio=kl.with_ratio,
    )


if __name__ == "__main__":
    run("grpo", main)
