"""Files of the rounds: which policy a round begins with, what was measured of it, and the answers to train on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError
from rlhf.job import Job, read_lines


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

    @property
    def best(self) -> int:
        """Number of the best answer, the first of equally good ones."""
        return self.rewards.index(max(self.rewards))


def read_ranked(job: Job) -> list[Ranked]:
    """The answers that stage answers left; of equal ones the first.

    Raises:
        UserError: there is none.
    """
    path = f"{folder(1)}/answers.jsonl"
    found = []
    for row in read_lines(job.input(path)):
        different = {tuple(one["tokens"]): one["score"] for one in reversed(row["answers"])}
        answers = list(reversed(different))
        found.append(Ranked(row["prompt_tokens"], [list(tokens) for tokens in answers], [different[tokens] for tokens in answers]))
    if not found:
        raise UserError(f"{path} has no row", remedy="run `dvc repro --force answers`, which writes it")
    return found
