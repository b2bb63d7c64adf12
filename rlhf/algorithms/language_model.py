"""Next-token loss: pretraining, SFT and the mixture term of PPO (PPO-ptx, arXiv 2203.02155, equation 2)."""

from __future__ import annotations

from torch import Tensor

from rlhf.tensors import token_log_probs


def next_token_loss(logits: Tensor, targets: Tensor, denominator: float) -> Tensor:
    """Sum of −log p(token | tokens before it) over the counted tokens, divided by ``denominator``.

    Args:
        logits: (n, V), each of the token before a counted one.
        targets: (n,) the counted tokens.
        denominator: number of counted tokens in the whole global batch, so that the loss does not depend on how the batch is cut.

    Returns:
        scalar loss
    """
    return -token_log_probs(logits, targets).sum() / denominator
