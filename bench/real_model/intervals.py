"""95% intervals of what several seeds measured: over held-out prompts, and over runs.

`over_prompts` and `pooled` say where the mean of these very models may lie if other prompts are asked: nothing of the luck of training.
`over_runs` says where the mean of other seeds may lie: it knows the luck of training as well, but from as few values as there are seeds,
so that it is wide or, by chance, narrow.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from bench.learning.warm_start import interval

SAMPLES = 10_000
Bounds = Sequence[float]


def over_prompts(values: np.ndarray) -> list[float]:
    """Percentile interval of the mean of one value of each prompt, prompts resampled with replacement."""
    drawn = np.random.default_rng(1).integers(len(values), size=(SAMPLES, len(values)))
    return [float(bound) for bound in np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])]


def pooled(values: Sequence[tuple[float, Bounds]], shared: Callable[[int, int], float]) -> list[float]:
    """Of the mean of several means with an interval each, over prompts that they have in part in common.

    Args:
        shared: the share of the prompts of the i-th that the j-th has too. On those both are taken to be right and wrong together, so
            that the interval is rather too wide than too narrow.
    """
    mean, errors = statistics.fmean(value for value, _ in values), [(high - low) / 2 for _, (low, high) in values]
    both = sum(2 * shared(i, j) * errors[i] * errors[j] for i, j in itertools.combinations(range(len(errors)), 2))
    error = math.sqrt(sum(one**2 for one in errors) + both) / len(errors)
    return [mean - error, mean + error]


def over_runs(values: Sequence[float]) -> list[float] | None:
    """Student's interval of the mean of one value of each run; None of a single one."""
    return list(interval(values)[1:]) if len(values) > 1 else None
