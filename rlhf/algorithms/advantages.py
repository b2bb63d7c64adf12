"""Advantages without a critic: from the rewards of several answers to a prompt, or of a whole batch, to a number for each token.

Read from top to bottom:

    1. reward of an answer     its score, less a penalty where it comes near the longest allowed, less β·Σ k1 where the KL stands there
    2. baseline                what an answer to this prompt is worth: subtracted
    3. scale of the group      divided by its spread
    4. tokens                  that number on the last token, −β·k1 on each one where the KL stands there, summed from each token on
    5. scale of the batch      whitened over all tokens (rlhf/algorithms/ppo.py)

Shapes: G prompts, k answers to each, B = G·k answers, those to one prompt side by side; A positions of the longest answer. ``mask`` (B, A)
is 1 on an answer's tokens, its end token included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.ppo import token_rewards, whiten


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, factor: float) -> Tensor:
    """min(0, −(|o| − (L − buffer)) / buffer)·factor (DAPO, arXiv 2503.14476, equation 13), at |o| ≤ L. Lengths (B,) → (B,)."""
    return ((longest - buffer - lengths).float() / buffer).clamp(max=0) * factor


def baselines(rewards: Tensor, lengths: Tensor, greedy: Tensor, kind: str) -> Tensor:
    """What is subtracted from each reward. Rewards and lengths (G, k), greedy (G,) → (G, k).

    mean             the group's (GRPO, arXiv 2402.03300, section 4.1)
    leave-one-out    that of the other answers, Σ_{j≠i} r_j / (k − 1) (RLOO, arXiv 2402.14740)
    length-weighted  Σ |o|·r / Σ |o| (OPO, arXiv 2505.23585)
    greedy           the reward of the likeliest answer (ReMax, arXiv 2310.10505)
    none             0

    Args:
        greedy: reward of each prompt's greedy answer; read by kind greedy alone.
    """
    if kind == "greedy":
        return greedy[:, None].expand_as(rewards)
    if kind == "none":
        return torch.zeros_like(rewards)
    if kind == "leave-one-out":
        found = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    else:
        weights = lengths if kind == "length-weighted" else torch.ones_like(rewards)
        found = (weights * rewards).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    # equal rewards: what rounding leaves of their distance from the mean would be scaled up to an advantage
    return torch.where(equal(rewards)[:, None], rewards, found)


def equal(rewards: Tensor) -> Tensor:
    """Which groups have nothing to tell better from worse (G,): all their rewards are the same. Rewards (G, k)."""
    return (rewards == rewards[:, :1]).all(1)


def returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Σ_{t' ≥ t} γ^(t' − t)·r_t' (REINFORCE++, arXiv 2501.03262), 0 beyond an answer's end. (B, A) → (B, A)."""
    found = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = (rewards[:, t] + gamma * following) * mask[:, t]
        found[:, t] = following
    return found


def advantages(
    rewards: Tensor,
    greedy: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    baseline: str,
    scale: str,
    epsilon: float,
    gamma: float,
    kl_where: str,
    beta: float,
) -> Tensor:
    """An advantage for each answer token. Rewards (G, k), greedy (G,), KL and mask (B, A) → (B, A).

    Args:
        greedy: as in `baselines`.
        kl: k1 = log π_old − log π_ref of each token.
        scale: group, (r − b) / (std + ε), std of a sample, with k − 1 (arXiv 2402.03300); batch, whitened over all tokens of the batch
            (arXiv 2501.03262); none (arXiv 2503.20783 shows what the first does to easy and to hard prompts).
        gamma: discount from each token to the next.
        kl_where: answer, β·Σ k1 comes off the reward before the baseline (arXiv 2402.14740); token, β·k1 off the reward of
            each token (arXiv 2501.03262), beside the baseline; elsewhere: none of it is here.
    """
    if kl_where == "answer":
        rewards = rewards - beta * (kl * mask).sum(1).view_as(rewards)
    centred = rewards - baselines(rewards, mask.sum(1).view_as(rewards), greedy, baseline)
    if scale == "group":
        centred = centred / (rewards.std(1, keepdim=True) + epsilon)
    found = returns(token_rewards(kl, centred.flatten(), mask, beta if kl_where == "token" else 0.0), mask, gamma)
    return whiten(found, mask) if scale == "batch" else found
