"""Hyperparameters that a bandit chooses while a stage learns (rlhf/algorithms/ultho.py), and the table of what that gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepspeed import DeepSpeedEngine

from rlhf.algorithms.ultho import Bandit
from rlhf.config.ultho import FACTOR, Ultho, Value, applied
from rlhf.engine.setup import move_schedule
from rlhf.job import Job
from rlhf.stages.answering import section

TABLE = "plots/ultho.csv"


@dataclass(frozen=True)
class Trained:
    """A model whose schedule goes by the stage's steps: with other epochs it would by its own end too early, or too late."""

    engine: DeepSpeedEngine
    learning_rate: float
    first: int = 0  # step in which it begins to learn
    chosen: bool = True  # whether the learning rate may be chosen


class Tuning:
    """The values in force, step by step; those of the section where its `ultho` is null."""

    def __init__(self, job: Job, trained: Sequence[Trained], state: Mapping[str, Any] | None) -> None:
        """Args:
        state: of a checkpoint; None: the beginning.
        """
        self.job, self.trained = job, trained
        self.first = max(one.first for one in trained)
        self.settings: Ultho | None = section(job).ultho
        self.rows: list[dict[str, float]] = []
        if self.settings:
            arms = {name: len(values) for name, values in self.settings.clusters.items()}
            self.bandit = Bandit.of(arms, self.settings.window, self.settings.exploration)
        if state:
            self.bandit, self.rows = Bandit.restored(state["bandit"]), list(state["rows"])

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint needs."""
        return {"bandit": self.bandit.state(), "rows": self.rows} if self.settings else None

    def next(self, step: int, reward: float, kl: float) -> Job:
        """The job with the values of a step, of whose rollout the mean reward and KL of an answer are known."""
        if not self.settings:
            return self.job
        signal = reward - self.settings.kl_weight * kl
        gain = self.bandit.credit(signal)
        if step >= self.first:
            self.bandit.choose()
        numbers = dict(zip(self.bandit.names, self.bandit.current, strict=True))
        chosen = {name: self.settings.clusters[name][number] for name, number in numbers.items()}
        self.rows.append({"step": step + 1, "signal": signal, "gain": gain, **self._told(self.settings, chosen)})
        own = section(self.job)
        for one in self.trained:
            factor = _number(chosen.get(FACTOR, 1.0)) if one.chosen else 1.0
            move_schedule(one.engine, max(0, step - one.first) * own.updates_per_step, factor * one.learning_rate)
        return replace(self.job, params=self.job.params.model_copy(update={self.job.stage: applied(own, chosen)}))

    def _told(self, settings: Ultho, chosen: Mapping[str, Value]) -> dict[str, float]:
        """The values in force, and the mean gain of each that there is."""
        told = {name: _number(value) for name, value in chosen.items()}
        for name, level in zip(self.bandit.names, self.bandit.values, strict=True):
            for number, value in enumerate(settings.clusters[name]):
                shown = " ".join(f"{part:g}" for part in (value if isinstance(value, tuple) else (value,)))
                told[f"{name} {shown}"] = level.quality(number)
        return told

    def write(self) -> None:
        """Write the table."""
        if self.settings and self.job.is_main:
            self.job.write_plot(TABLE, self.rows)


def _number(value: Value) -> float:
    """A value as a number: of a pair the upper one."""
    return float(value[-1] if isinstance(value, tuple) else value)
