"""Files of the rounds: which policy a round begins with, what was measured of it, and the answers to train on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError
from rlhf.job import Job, read_lines

LONGER = "raise answers.max_answer_tokens, or train sft longer, until answers end by themselves"


def policy(number: int) -> str:
    """Where the policy lies that so many rounds have made."""
    return f"models/round-{number}" if number else "models/sft"


def folder(number: int) -> str:
    """Where a round's answers and pairs lie."""
    return f"data/rounds/{number}"


def measured(job: Job, number: int, stage: str = "answers") -> dict[str, Any]:
    """The numbers of one of a round's stages."""
    return dict(json.loads(job.input(f"metrics/{stage}-{number}.json").read_text(encoding="utf-8")))


def best(rewards: Sequence[float]) -> int:
    """Number of the best policy, the latest of equally good ones."""
    return max(range(len(rewards)), key=lambda number: (rewards[number], number))


def hand_on(job: Job, number: int, path: str) -> None:
    """Write the policy of so many rounds once more, as the output `path`; what made it, the launcher says of each output anew."""
    if job.is_main:
        shutil.copytree(job.input(policy(number)), job.output(path), ignore=shutil.ignore_patterns("lineage.json"), dirs_exist_ok=True)


@dataclass(frozen=True)
class Ranked:
    """A prompt and different answers to it, as token ids, with their rewards."""

    prompt: list[int]
    answers: list[list[int]]
    rewards: list[float]
    ended: list[bool]  # by themselves, not cut off

    @property
    def best(self) -> int:
        """Number of the best answer that ended, the first of equally good ones."""
        return max((i for i, ended in enumerate(self.ended) if ended), key=self.rewards.__getitem__)

    @property
    def is_ranked(self) -> bool:
        """Whether that is better than another one."""
        return self.rewards[self.best] > min(self.rewards)


def read_ranked(job: Job) -> tuple[list[Ranked], int]:
    """The answers that stage answers left, of equal ones the first; and how many prompts were left out, as all of theirs were cut off.

    Raises:
        UserError: there is none, or none that ended.
    """
    path = f"{folder(1)}/answers.jsonl"
    found = []
    for row in read_lines(job.input(path)):
        different = list(reversed({tuple(one["tokens"]): one for one in reversed(row["answers"])}.values()))
        tokens, rewards, ended = ([one[name] for one in different] for name in ("tokens", "score", "ended"))
        found.append(Ranked(row["prompt_tokens"], tokens, rewards, ended))
    if not found:
        raise UserError(f"{path} has no row", remedy="run `dvc repro --force answers`, which writes it")
    whole = [row for row in found if any(row.ended)]
    cut_off = len(found) - len(whole)
    if not whole:
        raise UserError(f"{path}: all answers to all of {len(found)} prompts were cut off: none can be learnt", remedy=LONGER)
    say_cut_off(job, cut_off, len(found))
    return whole, cut_off


def say_cut_off(job: Job, cut_off: int, prompts: int) -> None:
    """Say how many prompts teach nothing, if there are any."""
    if cut_off:
        job.say(f"{cut_off} of {prompts} prompts teach nothing, as their best answers were cut off: {LONGER}")
