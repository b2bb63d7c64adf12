"""Next-token loss: pretraining, SFT and the mixture term of PPO (PPO-ptx, arXiv 2203.02155, equation 2)."""

from __future__ import annotations

from torch import Tensor

from rlhf.tensors import token_log_probs


def next_token_loss(logits: Tensor, ids: Tensor, loss_mask: Tensor, denominator: float) -> Tensor:
    """Sum of −log p(token | tokens before it) over the masked tokens, divided by ``denominator``.

    Args:
        logits: (B, T, V).
        ids: (B, T) token ids.
        loss_mask: (B, T), 1 for each token whose prediction counts; 0 on the first token of each sequence, which nothing predicts.
        denominator: number of counted tokens in the whole global batch, so that the loss does not depend on how the batch is cut.

    Returns:
        scalar loss
    """
    wanted = loss_mask[:, 1:].bool()
    return -token_log_probs(logits[:, :-1][wanted], ids[:, 1:][wanted]).sum() / denominator
