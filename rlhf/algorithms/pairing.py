"""Which two of a prompt's answers make a pair: the best one, against the worst or one two standard deviations below the mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def pair(rewards: Sequence[float], ended: Sequence[bool], rejected: str) -> tuple[int, int] | None:
    """Numbers of the answers that win and lose, of equal ones the first; None where no answer that may win is better than another one.

    Args:
        rewards: of each answer.
        ended: whether each ended by itself: one that was cut off never wins, as it would teach not to end.
        rejected: worst; or two-sigma: of those that are worse than the best, the one nearest to μ − 2σ, as of many answers the worst is
            one of a kind (arXiv 2502.16825).
    """
    wanted = min(rewards) if rejected == "worst" else statistics.fmean(rewards) - 2 * statistics.pstdev(rewards)
    winner = max((i for i in range(len(rewards)) if ended[i]), key=rewards.__getitem__, default=None)
    if winner is None:
        return None
    worse = [i for i in range(len(rewards)) if rewards[i] < rewards[winner]]
    return (winner, min(worse, key=lambda i: abs(rewards[i] - wanted))) if worse else None
