"""Section rewards in a stage that learns from its own answers: asked on each rank, summed, looked at over all ranks, and logged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.config.rewards import RewardEntry
from rlhf.config.training import Answering
from rlhf.job import Job
from rlhf.rewards.scoring import Checkers, Outcome, check_failures, first_failures

LEAST_TOLD = 0.1  # of the answers of a step: fewer may be chance


@dataclass
class Rewards:
    """All entries; of the model's the stage says what it gives."""

    entries: Sequence[RewardEntry]
    checkers: Checkers
    # entries whose first failure was told, files of which it was told that they were edited, remedies
    told: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, job: Job) -> Rewards:
        return cls(job.params.rewards, Checkers.of(job.params.rewards, job.root, job.world_size, job.functions))

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the model: what is trained on is all that there is to tell."""
        return not self.checkers.entries and self.entries[0].weight == 1

    def begin(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Future[dict[str, list[Outcome]]] | None:
        """Ask all but the model."""
        return self.checkers.begin(rows, answers) if self.checkers.entries else None

    def collect(self, asked: Future[dict[str, list[Outcome]]] | None) -> dict[str, list[Outcome]]:
        return asked.result() if asked else {}

    def summed(self, outcomes: Mapping[str, Outcome], model: Sequence[float]) -> tuple[float, dict[str, Outcome]]:
        """What is trained on, and what each entry gave, of one answer.

        Args:
            outcomes: of all entries but the model.
            model: its score, where there is one.
        """
        found = {entry.name: Outcome(model[0]) if entry.kind == "model" else outcomes[entry.name] for entry in self.entries}
        return sum(entry.weight * found[entry.name].score for entry in self.entries), found

    def check(
        self,
        job: Job,
        step: int,
        answers: Sequence[Mapping[str, Outcome]],
        rewards: Sequence[float] = (),
        ended: Sequence[bool] = (),
        groups: int = 1,
    ) -> dict[str, float]:
        """Look at what all ranks were given in a step; what is logged of it.

        Args:
            answers: of all of them, what each entry gave.
            rewards, ended: of those that are learnt from, what comes of that in the end, and whether each ended by itself.
            groups: of which each is held against its own.

        Raises:
            UserError: an entry failed on too many answers.
        """
        self._tell_of_ends(job, step, rewards, ended, groups)
        self._tell_of_clips(job, step, rewards, ended)
        if self.plain:
            return {}
        self._tell_of_edits(job)
        given = {entry.name: [one[entry.name] for one in answers] for entry in self.entries}
        for name, failure in first_failures(given).items():
            if name not in self.told:
                self.told.add(name)
                job.say(f"reward '{name}' failed for the first time, in step {step}:\n{failure.rstrip()}")
        check_failures(self.checkers.entries, given, f"stage {job.stage}, step {step}")
        return {f"reward/{name}{what}": value for name, outcomes in given.items() for what, value in summary(outcomes).items()}

    def _tell_of_edits(self, job: Job) -> None:
        for file in job.params.reward_files if job.is_main else ():
            kept, now = job.functions / file, job.input(file)
            if file not in self.told and kept.is_file() and not (now.is_file() and kept.read_bytes() == now.read_bytes()):
                self.told.add(file)
                job.say(f"{file} was edited: this run goes on by what it was, {kept}, and can be published only if {file} is that again")

    def _tell_of_ends(self, job: Job, step: int, rewards: Sequence[float], ended: Sequence[bool], groups: int) -> None:
        """Say where answers that are cut off get more than others: the mean score of people's answers is 0, that of a policy's anything."""
        more = []  # of each group that has both
        size = max(1, len(rewards) // groups)
        for first in range(0, len(rewards), size):
            of_group = list(zip(rewards[first : first + size], ended[first : first + size], strict=True))
            whole, cut_off = ([reward for reward, end in of_group if end is this] for this in (True, False))
            if whole and cut_off:
                more.append(statistics.fmean(cut_off) - statistics.fmean(whole))
        some = len(rewards) - sum(ended) >= LEAST_TOLD * len(rewards)
        section, fixed = job.params.answering_key, job.params.answering.no_eos_reward is not None
        remedy = f"lower {section}.no_eos_reward" if fixed else f"raise {section}.missing_eos_penalty"
        if not some or not more or remedy in self.told or (mean := statistics.fmean(more)) <= 0:
            return
        self.told.add(remedy)
        what = f"answers that are cut off have a reward that is {mean:.3g} higher on the average than that of answers that end"
        job.say(f"step {step}: {what}, so that it pays not to end; {remedy}")

    def _tell_of_clips(self, job: Job, step: int, rewards: Sequence[float], ended: Sequence[bool]) -> None:
        """Say where many answers have one reward because it is cut: nothing is learnt of what lies beyond."""
        own = job.params.answering
        clip = own.reward_clip if isinstance(own, Answering) else math.inf
        share = statistics.fmean(end and abs(reward) >= clip for reward, end in zip(rewards, ended, strict=True)) if rewards else 0.0
        remedy = f"raise {job.params.answering_key}.reward_clip"
        if share >= LEAST_TOLD and remedy not in self.told:
            self.told.add(remedy)
            job.say(f"step {step}: {share:.0%} of the rewards are cut at ±{clip:g}; {remedy}")

    def seconds(self) -> dict[str, float]:
        """What each entry took since this was last asked, for the log alone."""
        taken = {f"reward/{name}_seconds": seconds for name, seconds in self.checkers.seconds.items()}
        self.checkers.seconds.clear()
        return taken


def final_rewards(scores: Tensor, ended: Tensor, params: Answering) -> Tensor:
    """What answers are rewarded with in the end (but for the KL), (B,).

    Args:
        scores: (B,), of those that were cut off as if they had ended there.
        ended: (B,), whether each ended by itself.
    """
    clipped = scores.clamp(-params.reward_clip, params.reward_clip)
    fixed = params.no_eos_reward
    cut_off = clipped - params.missing_eos_penalty if fixed is None else torch.full_like(clipped, fixed)
    return torch.where(ended, clipped, cut_off)


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean and spread of the scores that an entry gave, the share that is 0, and the share for which it failed."""
    scores = [outcome.score for outcome in outcomes if outcome.asked] or [0.0]
    return {
        "": statistics.fmean(scores),
        "_std": statistics.pstdev(scores),
        "_zero": scores.count(0.0) / len(scores),
        "_failed": sum(outcome.failure is not None for outcome in outcomes) / len(outcomes),
    }
