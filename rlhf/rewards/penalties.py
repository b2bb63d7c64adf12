"""Built-in functions that take something off: each gives a number from −1 to 0."""

from __future__ import annotations


def length(answer: str, most: int, over: int) -> float:
    """0 up to `most` words, then falling to −1 at `over` words more (as DAPO shapes over-long answers, arXiv 2503.14476)."""
    return -min(1.0, max(0, len(answer.split()) - most) / over)


def repetition(answer: str, words: int = 3) -> float:
    """Less the share of runs of so many words that stood in the answer before (arXiv 2502.03373)."""
    said = answer.lower().split()
    runs = list(zip(*(said[first:] for first in range(words)), strict=False))
    return len(set(runs)) / len(runs) - 1 if runs else 0.0
