"""Pairwise loss of the reward model (Bradley–Terry; arXiv 2203.02155, equation 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(chosen: Tensor, rejected: Tensor, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """−log σ(chosen − rejected) on the scores at each answer's last token.

    Args:
        chosen, rejected: (B,) scores.
        denominator: pairs in the whole global batch.

    Returns:
        scalar loss; sums over the rows given (correct, margin, chosen, rejected), for the caller to divide
    """
    margin = chosen.float() - rejected.float()
    loss = -F.logsigmoid(margin).sum() / denominator
    stats = {"accuracy": (margin > 0).float(), "margin": margin, "chosen_score": chosen, "rejected_score": rejected}
    return loss, {name: value.detach().float().sum() for name, value in stats.items()}
