"""The answers of stage grpo: several to each prompt, sampled, scored, and sampled again where they tell nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.advantages import equal, overlong_penalty
from rlhf.config.group import Grpo
from rlhf.engine.distributed import block, join, sharing_micro_batches
from rlhf.engine.order import Order
from rlhf.engine.speed import Clock
from rlhf.job import Job
from rlhf.rollout.experience import Scored
from rlhf.rollout.generate import Rollouts
from rlhf.rollout.sampling import Sampling
from rlhf.stages import stored
from rlhf.stages.answering import Models, roll_out, score
from rlhf.stages.rewarding import final_rewards


@dataclass(frozen=True)
class Group:
    """A prompt and what was made of it, the same on every rank."""

    prompt: int  # number among the prompts
    answers: list[Scored]  # k
    greedy: Scored | None  # the likeliest one, where it is the baseline


@dataclass(frozen=True)
class Collected:
    """The groups of a step, and what it took to get them."""

    groups: list[Group]
    place: int  # in the order of the prompts, from which the next step goes on
    made: list[Scored]  # all answers, those of groups that were replaced as well
    replaced: int  # groups


def collect(job: Job, models: Models, prompts: Sequence[dict[str, Any]], order: Order, place: int, step: int, clock: Clock) -> Collected:
    """Sample the groups of a step. Those whose rewards are all equal are replaced by new prompts, in `resample_rounds` rounds at most
    (DAPO, arXiv 2503.14476, section 3.2); when these are over, equal ones fill what is missing.

    Args:
        place: of the first prompt in the order.
    """
    params = job.params.grpo
    wanted = params.rollout_batch_size // params.answers_per_prompt
    kept: list[Group] = []
    spare: list[Group] = []
    made: list[Scored] = []
    for _ in range(1 + params.resample_rounds):
        missing = wanted - len(kept)
        numbers = order.following(place, missing)
        groups = answer(job, models, prompts, numbers, place, step, clock)
        place += missing
        made += [row for group in groups for row in (*group.answers, *([group.greedy] if group.greedy else []))]
        tells = [not params.resample_rounds or not equal(rewards(params, group.answers)[None]).item() for group in groups]
        kept += [group for group, good in zip(groups, tells, strict=True) if good]
        spare += [group for group, good in zip(groups, tells, strict=True) if not good]
        if len(kept) == wanted:
            break
    filling = spare[: wanted - len(kept)]
    found = kept + filling
    stored.save(job, step + 1, [(prompts[g.prompt]["row"], [*g.answers, *([g.greedy] if g.greedy else [])]) for g in found])
    return Collected(found, place, made, len(spare) - len(filling))


def rewards(params: Grpo, answers: Sequence[Scored]) -> Tensor:
    """What each answer (B,) is rewarded with, but for the KL."""
    found = final_rewards(torch.tensor([row.score for row in answers]), torch.tensor([row.ended for row in answers]), params)
    if params.overlong is None:
        return found
    lengths = torch.tensor([len(row.answer) for row in answers])
    return found + overlong_penalty(lengths, params.max_answer_tokens, params.overlong.buffer, params.overlong.factor)


def answer(
    job: Job, models: Models, prompts: Sequence[dict[str, Any]], numbers: Sequence[int], place: int, step: int, clock: Clock
) -> list[Group]:
    """Answer some prompts, each k times, and score that. The ranks share the answers; each has all of them in the end.

    Args:
        numbers, place: of the prompts, and of the first one in their order: an answer's seed comes from its place.
    """
    params = job.params.grpo
    each = params.answers_per_prompt
    rows = [(i, k) for i in range(len(numbers)) for k in range(each)]
    greedy = [(i, each) for i in range(len(numbers))] if params.baseline == "greedy" else []
    mine: list[Rollouts] = []
    asked_of: list[dict[str, Any]] = []  # the row of each of this rank's answers
    for wanted in (rows, greedy):
        if wanted:
            own = block(even(wanted, job.world_size), job, "grpo.rollout_batch_size")
            asked = [prompts[numbers[i]]["ids"] for i, _ in own]
            asked_of += [prompts[numbers[i]]["row"] for i, _ in own]
            seeds = [job.seed("rollout", place + i, k) for i, k in own]
            if job.rollouts:
                mine.append(stored.replay([prompts[numbers[i]] for i, _ in own], [k for _, k in own], step))
            else:
                mine.append(roll_out(job, models, asked, seeds, step, clock, sampling(params, likeliest=wanted is greedy)))
    together = Rollouts(
        [ids for part in mine for ids in part.prompts],
        [ids for part in mine for ids in part.answers],
        [row for part in mine for row in part.log_probs],
        [word for part in mine for word in part.finish],
        step,
    )
    parts = sharing_micro_batches(
        range(len(together.answers)), lambda row: together.prompts[row], lambda row: len(together.answers[row]), job
    )
    scored = score(job, models, asked_of, together, parts, exact=not samples_otherwise(params))
    first = len(mine[0].answers)
    found, likeliest = join(scored[:first], job)[: len(rows)], join(scored[first:], job)[: len(greedy)]
    clock.stop("scoring")
    return [Group(number, found[i * each : (i + 1) * each], likeliest[i] if greedy else None) for i, number in enumerate(numbers)]


def even(rows: list[tuple[int, int]], ranks: int) -> list[tuple[int, int]]:
    """As many rows for each rank: some stand there twice, and nobody reads them again."""
    return [*rows, *(rows[i % len(rows)] for i in range(-len(rows) % ranks))]


def sampling(params: Grpo, *, likeliest: bool) -> Sampling:
    return Sampling(0.0 if likeliest else params.temperature, params.top_k, params.top_p, params.max_answer_tokens, of_what_is_left=True)


def samples_otherwise(params: Grpo) -> bool:
    """Whether the rollout's log-probabilities are not what training computes, whatever the arithmetic."""
    return params.mismatch.correction != "none" or params.top_k > 0 or params.top_p < 1
