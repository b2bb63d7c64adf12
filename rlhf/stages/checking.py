"""What a program says of the held-out answers: accuracy, pass@k and the majority's accuracy, of each policy on the same prompts."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.config.rewards import CheckedReward, FunctionReward
from rlhf.engine.distributed import gather
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.rewards.functions import source
from rlhf.rewards.scoring import Checkers, check_failures, checked, scores_row

Row = Mapping[str, Any]
Interval = Callable[[np.ndarray], list[float]]


@dataclass(frozen=True)
class Checked:
    """A policy's answers to the prompts that a checker is for, as the checkers see them: of each prompt, of each answer."""

    right: list[list[bool]]
    votes: list[list[str]]  # equal ones come to one result; none where there is one answer to a prompt


def checkers_of(job: Job) -> list[CheckedReward]:
    """The entries of section rewards that tell right from wrong."""
    return [entry for entry in checked(job.params.rewards) if entry.right_from is not None]


def scored(job: Job, entries: Sequence[CheckedReward], rows: Sequence[Row], answers: Sequence[str]) -> list[list[float | None]]:
    """The score that each entry gives an answer to each row; None where it is not for that row. The ranks share the rows.

    Raises:
        UserError: one failed on too many.
    """
    mine = slice(job.rank, None, job.world_size)
    checkers = Checkers(entries, job.root, job.world_size, job.functions)
    try:
        found = checkers.score(rows[mine], answers[mine])
    finally:
        checkers.close()
    own = [{name: outcomes[i] for name, outcomes in found.items()} for i in range(len(rows[mine]))]
    everyone = gather(own, job)
    check_failures(entries, {entry.name: [row[entry.name] for row in everyone] for entry in entries}, f"stage {job.stage}")
    return [[row[entry.name].score if row[entry.name].asked else None for entry in entries] for row in everyone]


def totals(job: Job, entries: Sequence[CheckedReward], rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
    """What all checkers give an answer to each row: the mean of their scores by weight, over those that are for it."""
    weights = [abs(entry.weight) or 1.0 for entry in entries]
    found = []
    for scores in scored(job, entries, rows, answers):
        given = [(weight, score) for weight, score in zip(weights, scores, strict=True) if score is not None]
        found.append(sum(weight * score for weight, score in given) / sum(weight for weight, _ in given) if given else 0.0)
    return found


def right(job: Job, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right by all checkers that are for its row."""
    entries = checkers_of(job)
    bounds = [entry.right_from for entry in entries]
    return [
        all(score >= bound for score, bound in zip(scores, bounds, strict=True) if score is not None and bound is not None)
        for scores in scored(job, entries, rows, answers)
    ]


def check(job: Job, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> Checked:
    """Several answers to each row, all rows being such that a checker is for them."""
    count = len(answers[0])
    flat, said = [row for row in rows for _ in range(count)], [answer for of_row in answers for answer in of_row]

    def by_row(values: list[Any]) -> list[list[Any]]:
        return [values[first : first + count] for first in range(0, len(values), count)]

    return Checked(by_row(right(job, flat, said)), by_row(votes(job, flat, said)) if count > 1 else [])


def votes(job: Job, rows: Sequence[Row], answers: Sequence[str]) -> list[str]:
    """The result of each answer, as the first checker that is for its row sees it."""
    found = [""] * len(rows)
    left = list(range(len(rows)))
    checkers = Checkers(checkers_of(job), job.root, job.world_size, job.functions)
    try:
        for entry in checkers.entries:
            mine = [i for i in left if scores_row(entry, rows[i])]
            left = [i for i in left if not scores_row(entry, rows[i])]
            for i, vote in zip(mine, checkers.votes(entry.name, [rows[i] for i in mine], [answers[i] for i in mine]), strict=True):
                found[i] = vote
    finally:
        checkers.close()
    return found


def measure(
    job: Job, rows: Sequence[Row], answers: Mapping[str, Sequence[Sequence[str]]], new: str, interval: Interval
) -> tuple[dict[str, Any], dict[str, dict[int, list[bool]]]]:
    """The numbers; and by policy, for the number of each prompt that was checked, whether each of its answers is right.

    Args:
        answers: by policy, several to each row.

    Raises:
        UserError: there is no held-out prompt that a checker is for.
    """
    numbers_of = [i for i, row in enumerate(rows) if any(scores_row(entry, row) for entry in checkers_of(job))]
    if not numbers_of:
        what = "no held-out prompt is of the sources that the entries of `rewards` with right_from are for"
        raise UserError(f"stage {job.stage}: {what}", remedy="give one of their sources a split.heldout above 0, or set right_from to null")
    checked_rows = [rows[i] for i in numbers_of]
    found = {name: check(job, checked_rows, [of_all[i] for i in numbers_of]) for name, of_all in answers.items()}
    by_number = {name: dict(zip(numbers_of, one.right, strict=True)) for name, one in found.items()}
    return numbers(checked_rows, found, new, interval), by_number


# --------------------------------------------------------------------------------------------------------------- numbers


def pass_at(n: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, of which there are n with so many right ones: unbiased (arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(right: Sequence[bool], votes: Sequence[str]) -> bool:
    """Whether the commonest result of several answers is right; of equally common ones the first counts."""
    return right[votes.index(Counter(votes).most_common(1)[0][0])]


def numbers(rows: Sequence[Row], found: Mapping[str, Checked], new: str, interval: Interval) -> dict[str, Any]:
    """Accuracy of both policies with its 95% interval, how much it rose, pass@k, the majority's, and by source and kind.

    Args:
        rows: the prompts that were checked.
        found: by policy.
        interval: 95% interval of the mean of a value for each prompt.
    """
    count = len(next(iter(found.values())).right[0])
    means = {name: np.array([statistics.fmean(row) for row in one.right]) for name, one in found.items()}
    accuracy = {name: {"value": float(values.mean()), "ci95": interval(values)} for name, values in means.items()}
    rise = means[new] - means["sft"]
    several = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= count]
    shares = {
        name: {str(k): statistics.fmean(pass_at(count, sum(row), k) for row in one.right) for k in several} for name, one in found.items()
    }
    by_majority = {
        name: statistics.fmean(majority(right, said) for right, said in zip(one.right, one.votes, strict=True))
        for name, one in found.items()
        if count > 1
    }
    return {
        **accuracy,
        "difference": float(rise.mean()),
        "ci95": interval(rise),
        "prompts": len(rows),
        "answers": count,
        "pass_at": shares,
        **({"majority": by_majority} if by_majority else {}),
        "by_source": divided([row.get("source") for row in rows], means, rise, interval),
        "by_kind": divided([kind_of(row) for row in rows], means, rise, interval),
    }


def kind_of(row: Row) -> str | None:
    """The kind of a row's task, where it has one."""
    kind = (row.get("columns") or {}).get("kind", (row.get("gold") or {}).get("kind"))
    return None if kind is None else str(kind)


def divided(
    parts: Sequence[str | None], means: Mapping[str, np.ndarray], rise: np.ndarray, interval: Interval
) -> dict[str, dict[str, Any]]:
    """The means of each part of the prompts, how many there are, and how much accuracy rose there, with its 95% interval."""
    names = np.array([str(part) for part in parts])
    found = {}
    for part in sorted({part for part in parts if part is not None}):
        inside = names == part
        values = {name: float(of_all[inside].mean()) for name, of_all in means.items()}
        risen = {"difference": float(rise[inside].mean()), "ci95": interval(rise[inside])}
        found[part] = {"n": int(inside.sum()), **values, **risen}
    return found


# -------------------------------------------------------------------------------------------------------------- identity


def identity(job: Job) -> list[Any]:
    """All that decides what the checkers say: scores of two models with the same one can be compared. Nothing where there are none."""
    entries = checkers_of(job)
    if not entries:
        return []
    files = {entry.file: None for entry in entries if isinstance(entry, FunctionReward) and entry.file}
    hashes = {file: hashlib.sha256(source(job.root, file, job.functions).read_bytes()).hexdigest() for file in files}
    return [[entry.model_dump(mode="json") for entry in entries], hashes, job.params.evaluate.answers]


def fingerprint(job: Job) -> str:
    return hashlib.sha256(json.dumps(identity(job), sort_keys=True).encode()).hexdigest()
