"""Learning from answers that lie there already: the policy is drawn to each by how much better it is (AWAC, arXiv 2006.09359).

    A = r − mean of the prompt's answers             in the place of Q(s, a) − V(s): an answer is one action, and its reward is known
    w = min(exp(A / λ), c)                           equation 13; c holds back what the exponential makes of one outlier
    L = Σ w / mean(w) · −log π(answer) / Σ |answer|  means and sums over the global batch: how it is cut does not matter

rlkit's `awac_trainer.py` weighs by softmax(A / λ)·B, which is exp(A / λ) / mean: the same where no weight comes to c, which it does not
have. It averages −log π over actions; here it is over tokens, so that long answers do not make the steps longer. trlx (`modeling_ilql.py`)
gives each token an advantage of its own and does not normalise: its steps grow with the weights.

Shapes: N answers, B of them in a global batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def advantages(rewards: Tensor, prompts: Tensor) -> Tensor:
    """How much better each answer is than the mean of those to its prompt. Rewards (N,), numbers of the prompts (N,) → (N,)."""
    count = int(prompts.max()) + 1
    sums = torch.zeros(count, dtype=rewards.dtype).index_add(0, prompts, rewards)
    return rewards - (sums / torch.bincount(prompts, minlength=count))[prompts]


def weights(advantages: Tensor, temperature: float, most: float) -> Tensor:
    """min(exp(A / λ), c) over its mean in the global batch. (B,) → (B,).

    Args:
        temperature: λ.
        most: c.
    """
    exponents = (advantages.double() / temperature).clamp(max=math.log(most))
    return (exponents.softmax(0) * len(advantages)).float()


def effective_sample_size(weights: Tensor) -> float:
    """(Σ w)² / Σ w²: as many equal weights would vary as little. B where all are equal, 1 where one counts alone. (B,)."""
    return (weights.sum() ** 2 / (weights**2).sum()).item()


def awac_loss(log_probs: Tensor, weights: Tensor, denominator: float) -> Tensor:
    """Σ w·−log π / denominator: a scalar.

    Args:
        log_probs: sums over an answer's tokens; of some answers of the global batch.
        weights: of these answers, normalised over the global batch.
        denominator: answer tokens in the global batch.
    """
    return -(weights * log_probs.float()).sum() / denominator
