"""Hyperparameters chosen while a run learns, by a bandit of two levels (ULTHO, arXiv 2503.06101).

An arm of the upper level is a hyperparameter (a cluster), one of the lower level a value of it. Before each update the upper level chooses
a cluster, and the lower one a value of that; the others keep theirs. Both choose the highest

    U = Q + c·√(ln t / N)

with Q the mean of the arm's last W gains, 0 before the first, and t and N, which begin at 1, how often its level and it were chosen. At
first all U are 0, and the first arm is chosen: there the values stand that the run begins with.

Where this differs from the released code (yuanmingqi/ULTHO): there an arm is given the returns of the rollout that was made before its
update; here those of the next rollout, which is the first that the update can have changed. And there c has to have the scale of the
returns; here a gain is how far a signal lies above the mean of the W before it, in standard deviations of its noise, at most BOUND of
them. The noise is read off the differences between one signal and the next: in the spread of all of them a rise that is steady counts
for more than the noise, and gives the same gain however fast it is.

What a cluster chose last stays in force while others are chosen, however bad it was. So c has to bring each cluster back in time: with 1
one bad gain, of −2, is not made up for in 60 steps; with 3 it is after 12.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

BOUND = 3.0


@dataclass
class Level:
    """A bandit of so many arms."""

    gains: list[list[float]]  # of each arm, its last W
    chosen: list[int]  # how often each arm was, and 1
    total: int = 1

    @classmethod
    def of(cls, arms: int) -> Level:
        return cls([[] for _ in range(arms)], [1] * arms)

    def quality(self, arm: int) -> float:
        """Q."""
        return statistics.fmean(self.gains[arm]) if self.gains[arm] else 0.0

    def choose(self, exploration: float) -> int:
        """The arm of the highest U; the first of several."""
        bounds = [self.quality(arm) + exploration * math.sqrt(math.log(self.total) / count) for arm, count in enumerate(self.chosen)]
        return bounds.index(max(bounds))

    def credit(self, arm: int, gain: float, window: int) -> None:
        self.gains[arm] = [*self.gains[arm], gain][-window:]
        self.chosen[arm] += 1
        self.total += 1


@dataclass
class Bandit:
    """Both levels, and what is in force. All that it knows is numbers and texts, which JSON keeps as they are."""

    window: int
    exploration: float
    names: list[str]  # of the clusters
    clusters: Level
    values: list[Level]  # of each cluster
    current: list[int]  # number of the value in force, of each cluster
    last: tuple[int, int] | None = None  # cluster and value whose update no rollout has told of yet
    signals: list[float] = field(default_factory=list)  # the last W

    @classmethod
    def of(cls, clusters: Mapping[str, int], window: int, exploration: float) -> Bandit:
        """Args:
        clusters: how many values each has, by name. Their order in a file means nothing: it is that of the names.
        window: W.
        exploration: c.
        """
        names = sorted(clusters)
        return cls(window, exploration, names, Level.of(len(names)), [Level.of(clusters[name]) for name in names], [0] * len(names))

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Bandit:
        levels = {"clusters": Level(**state["clusters"]), "values": [Level(**level) for level in state["values"]]}
        return cls(**{**state, **levels, "last": tuple(state["last"]) if state["last"] else None})

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def credit(self, signal: float) -> float:
        """Tell what a rollout brought: its gain, which the arm has that was chosen before it."""
        gain = normalised(signal, self.signals)
        if self.last:
            cluster, value = self.last
            self.clusters.credit(cluster, gain, self.window)
            self.values[cluster].credit(value, gain, self.window)
            self.last = None
        self.signals = [*self.signals, signal][-self.window :]
        return gain

    def choose(self) -> None:
        """Choose for the update that comes next."""
        cluster = self.clusters.choose(self.exploration)
        value = self.values[cluster].choose(self.exploration)
        self.current[cluster] = value
        self.last = cluster, value


def normalised(signal: float, before: list[float]) -> float:
    """Standard deviations of noise between a signal and the mean of those before it, within ± BOUND; 0 where nothing tells the noise."""
    if len(before) < 2:
        return 0.0
    # of two signals with noise of the same size the difference has twice its variance (von Neumann)
    noise = math.sqrt(statistics.fmean((after - one) ** 2 for one, after in pairwise([*before, signal])) / 2)
    return max(-BOUND, min(BOUND, (signal - statistics.fmean(before)) / noise)) if noise else 0.0
