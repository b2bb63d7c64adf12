"""Planned ends of answers, for whatever samples by transformers' `generate`."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class EndsAsPlanned(LogitsProcessor):
    """Each row draws its end token where it is planned to end, and nowhere else."""

    def __init__(self, ends: torch.Tensor, eos_id: int) -> None:
        self.ends, self.eos_id = ends, eos_id  # (B,) columns, prompt included

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        over = self.ends == input_ids.shape[1] + 1
        scores[:, self.eos_id] = float("-inf")
        scores[over] = float("-inf")
        scores[over, self.eos_id] = 0.0
        return scores
