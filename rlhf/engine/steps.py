"""The steps of a training loop: when a checkpoint is due, and how SIGTERM ends the loop in order."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

from rlhf.engine import checkpoints
from rlhf.engine.partition import any_rank
from rlhf.job import Job


class Steps:
    """Numbers the steps from `first` to `total` − 1. SIGTERM lets the step under way end, has a checkpoint made, and exits with 143.

    A signal may reach some ranks only, or reach them in different steps: they agree at the end of each step.
    """

    def __init__(self, job: Job, first: int, total: int, checkpoint_every: int) -> None:
        self.job, self.first, self.total, self.every = job, first, total, checkpoint_every
        self.asked = self.stopping = False

    def __iter__(self) -> Iterator[int]:
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            for number in range(self.first, self.total):
                self.job.clock["step"] = time.monotonic()
                yield number
                if self.stopping:
                    checkpoints.settle()
                    self.job.say(f"stopped after step {number + 1}")
                    sys.exit(128 + signal.SIGTERM)
        finally:
            self.job.clock.pop("step", None)
            signal.signal(signal.SIGTERM, before)

    def checkpoint_due(self, number: int) -> bool:
        """Whether to save after step `number`, the same on all ranks, which must all call it. After the last step outputs are written."""
        if number + 1 == self.total:
            return False
        self.stopping = any_rank(self.asked)
        return self.stopping or (number + 1) % self.every == 0

    def _ask(self, _number: int, _frame: object) -> None:
        self.asked = True
