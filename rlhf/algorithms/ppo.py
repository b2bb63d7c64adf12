"""Proximal policy optimisation for language models: rewards, advantages, losses.

Read from top to bottom it is one PPO step after the rollout (arXiv 1707.06347; arXiv 1909.08593; arXiv 2203.02155):

    1. token rewards     −β·KL per token, plus the score on the last token
    2. advantages        GAE (arXiv 1506.02438), then whitening over the global batch
    3. policy loss       clipped ratio
    4. value loss        clipped around the old values

Shapes: B answers, A positions of the longest answer. ``mask`` (B, A) is 1 on an answer's tokens, its end token included.
Losses are sums over valid tokens divided by ``denominator``, the number of valid tokens in the whole global mini-batch: they do not depend
on how the batch is cut into ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_EXPONENT = 10.0


def bounded_exp(exponent: Tensor) -> Tensor:
    """eˣ up to x = 10, and along its tangent from there on: e¹⁰·(1 + x − 10), which is finite for every x.

    Other code clamps: verl log-ratios to ±20 and each token's k3 to 10, OpenRLHF each estimate to ±10. A clamp has no gradient beyond its
    bound, where a token is furthest off; here it pulls as hard as at the bound.
    """
    held = exponent.clamp(max=LARGEST_EXPONENT)
    return held.exp() * (1 + exponent - held)


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from sampled tokens (Schulman, "Approximating KL divergence", 2020). (B, A) → (B, A).

    k1 is unbiased and may be negative; k2 is biased, of low variance; k3 is unbiased and never negative, but held back (`bounded_exp`)
    where a token is more than e¹⁰ times as likely to the reference.
    """
    log_ratio = log_probs - reference_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return bounded_exp(-log_ratio) - 1 + log_ratio


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """−β·KL on every answer token; the score on top of it at the last one. KL (B, A), scores (B,), mask (B, A) → (B, A)."""
    rewards = -beta * kl * mask
    last = mask.sum(-1).long() - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16), from the last token backwards.

    Beyond an answer's last token the value is 0, and so are advantage and return.

    Returns:
        advantages (B, A), not whitened; returns (B, A) = advantages + values
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(advantage)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * gae_lambda * advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and std 1 over the valid tokens of the global batch, 0 elsewhere. (B, A) → (B, A)."""
    valid = advantages[mask.bool()].double()
    mean, std = valid.mean(), valid.std(correction=0)
    return ((advantages - mean) / (std + 1e-8) * mask).float()


@dataclass(frozen=True)
class LossStats:
    """A loss and the sums that its logged means are made of."""

    loss: Tensor
    sums: dict[str, Tensor]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: tuple[float, float],
    dual_clip: float | None,
    denominator: float,
) -> LossStats:
    """−min(ratio·A, clip(ratio, 1 − ε_low, 1 + ε_high)·A) (arXiv 1707.06347, equation 7). All tensors (B, A).

    Args:
        clip: (ε_low, ε_high); a higher ε_high lets unlikely tokens rise faster (clip-higher, arXiv 2503.14476).
        dual_clip: c > 1 bounds the loss of tokens with a negative advantage at −c·A (arXiv 1912.09729, equation 5); None: off.
    """
    log_ratio = (log_probs - old_log_probs) * mask
    ratio = bounded_exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip[0], 1 + clip[1])
    per_token = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.minimum(per_token, -dual_clip * advantages), per_token)
    loss = (per_token * mask).sum() / denominator
    with torch.no_grad():
        sums = {
            "clip_fraction": ((clipped > unclipped).float() * mask).sum(),
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),
        }
    return LossStats(loss, sums)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None, denominator: float) -> LossStats:
    """0.5·max((V − R)², (clip(V, V_old ± ε) − R)²): the clipped form of the PPO implementations; clip None: 0.5·(V − R)². All (B, A)."""
    clipped_values = values if clip is None else old_values + (values - old_values).clamp(-clip, clip)
    squared, squared_clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    loss = 0.5 * (torch.maximum(squared, squared_clipped) * mask).sum() / denominator
    with torch.no_grad():
        sums = {"value_clip_fraction": ((squared_clipped > squared).float() * mask).sum()}
    return LossStats(loss, sums)


@dataclass
class KlController:
    """β of the KL penalty: fixed, or following the measured KL (arXiv 1909.08593, section 2.2)."""

    beta: float
    adaptive: bool
    target: float
    horizon: int

    def set(self, beta: float) -> None:
        """Set β where it is fixed."""
        if not self.adaptive:
            self.beta = beta

    def update(self, kl: float, answers: int) -> None:
        """Move β towards the target KL per answer, after a rollout of so many answers."""
        if self.adaptive:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * answers / self.horizon
