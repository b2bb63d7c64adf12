"""Answers that stop at a text, whatever tokens it is written in."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.rollout.generate import Stop


def at_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Stop:
    """An answer stops with the token that completes one of the texts."""
    # a token is a byte at least, and the text may begin within one
    tail = max(len(text.encode()) for text in texts) + 1

    def stop(number: int, answer: list[int]) -> bool:
        end = str(tokenizer.decode(answer[-tail:]))
        return any(text in end for text in texts)

    return stop
