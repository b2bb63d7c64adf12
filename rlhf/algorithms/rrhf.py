"""RRHF: a policy learns to find answers as likely as the rewards rank them (arXiv 2304.05302).

p_i = Σ log π(token) / |y_i|^α is an answer's score, α = 1 its mean token log-probability; r_i its reward.

    ranking   Σ_{r_i < r_j} max(0, p_i − p_j)      equation 3; equal rewards make no pair
    best of   −Σ log π(token of the best answer)   equation 4; of equally good ones the first

An answer that was cut off is never the better one of a pair, nor the best: it would teach not to end. It may be the worse one.

The released code sums the pairs, and averages the best answer's tokens over the padded length, so that the number of answers and the
padding change what both weigh. Here the first is a mean over a prompt's pairs, then over the prompts that have any; the second a mean
over the best answers' tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rrhf_loss(
    log_probs: Tensor,
    lengths: Tensor,
    rewards: Tensor,
    there: Tensor,
    ended: Tensor,
    length_exponent: float,
    ranking_weight: float,
    ranked_prompts: float,
    best_tokens: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on B prompts with at most K answers each.

    Args:
        log_probs, lengths, rewards, there, ended: (B, K): Σ log π of each answer, its tokens, its reward, whether there is such an answer,
            and whether it ended by itself, as one of each prompt must.
        ranked_prompts, best_tokens: of the whole global batch, so that the loss does not depend on how it is cut: prompts that make a
            pair; tokens of the best answers.

    Returns:
        scalar loss; sums over the prompts given, for the caller to divide: ranking_loss and best_loss are divided already, so is
        in_order, the share of pairs whose better answer is likelier
    """
    log_probs = log_probs.float()
    scores = log_probs / lengths.clamp(min=1) ** length_exponent
    pairs = better(rewards, there, ended)
    behind = (scores[:, :, None] - scores[:, None, :]).clamp(min=0)  # p_i − p_j, i in rows
    count = pairs.sum((1, 2)).clamp(min=1)
    ranking = ((behind * pairs).sum((1, 2)) / count).sum() / max(ranked_prompts, 1)
    best = best_of(rewards, ended)
    found = -log_probs.gather(1, best[:, None]).sum() / best_tokens
    in_order = ((scores[:, :, None] < scores[:, None, :]) & pairs.bool()).sum((1, 2)) / count
    stats = {"ranking_loss": ranking, "best_loss": found, "in_order": in_order.sum() / max(ranked_prompts, 1)}
    return ranking_weight * ranking + found, {name: value.detach() for name, value in stats.items()}


def better(rewards: Tensor, there: Tensor, ended: Tensor) -> Tensor:
    """1 where the answer of a column ended, and is better than that of a row (B, K, K)."""
    both = there.bool()[:, :, None] & ended.bool()[:, None, :]
    return ((rewards[:, :, None] < rewards[:, None, :]) & both).float()


def best_of(rewards: Tensor, ended: Tensor) -> Tensor:
    """Number of the best answer to each prompt that ended (B,), the first of equally good ones."""
    return rewards.masked_fill(~ended.bool(), -torch.inf).argmax(1)
