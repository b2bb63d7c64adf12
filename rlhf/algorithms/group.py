"""Policy losses without a critic: ratio × objective × normaliser, the KL as a loss, and what makes up for another sampler.

Each loss is Σ weight·(−objective + β·KL) over the tokens of the global mini-batch, the weights being the normaliser's: how the batch is cut
into ranks and micro-batches does not matter.

Shapes: B answers, A positions of the longest answer. ``mask`` (B, A) is 1 on an answer's tokens, its end token included; all
log-probabilities are (B, A), 0 beyond an answer's end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.ppo import LossStats, bounded_exp, kl_estimate


@dataclass(frozen=True)
class Objective:
    """What the loss is made of; the names are those of section grpo."""

    ratio: str
    objective: str
    policy_clip: tuple[float, float]  # how far below and above 1
    dual_clip: float | None
    ratio_cap: tuple[float, float]  # lowest and highest ratio, of cispo
    kl_coefficient: float  # of the KL as a loss; 0: it is none
    kl_estimator: str
    kl_with_ratio: bool


def token_weights(mask: Tensor, normaliser: str, tokens: float, answers: float, constant: float) -> Tensor:
    """What each token counts in the sum that the loss is. Mask (B, A) → (B, A).

    tokens     1 / Σ|o|        mean over all tokens (DAPO, arXiv 2503.14476, section 3.3)
    answers    1 / (N·|o|)     mean over an answer's tokens, then over answers (GRPO, arXiv 2402.03300, equation 3; GSPO)
    constant   1 / (N·L)       a constant in the place of an answer's length (Dr.GRPO, arXiv 2503.20783, section 3.2)
    sequences  1 / N           sum over an answer's tokens, mean over answers: the policy gradient as it stands (REINFORCE)

    Args:
        tokens, answers: those of the whole global mini-batch, whatever a correction masks: what it keeps must not count for more.
        constant: L.
    """
    if normaliser == "tokens":
        return mask / tokens
    if normaliser == "answers":
        return mask / (answers * mask.sum(1, keepdim=True))
    return mask / (answers * constant if normaliser == "constant" else answers)


def log_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, ratio: str) -> Tensor:
    """Logarithm of the importance ratio that each token is given. (B, A) → (B, A), 0 beyond an answer's end.

    token           log π − log π_old
    sequence-sum    its sum over the answer, that of the answer's own ratio (RLOO, arXiv 2402.14740)
    sequence-mean   its mean over the answer (GSPO, arXiv 2507.18071, equation 7)
    sequence-token  the same number, whose gradient is that of the token's own log-probability (GSPO-token, section 4.3)
    """
    of_tokens = (log_probs - old_log_probs) * mask
    if ratio == "token":
        return of_tokens
    lengths = 1.0 if ratio == "sequence-sum" else mask.sum(1, keepdim=True)
    of_answers = of_tokens.sum(1, keepdim=True) / lengths * mask
    if ratio == "sequence-token":
        return of_answers.detach() + of_tokens - of_tokens.detach()
    return of_answers


def clipped_objective(ratio: Tensor, advantages: Tensor, clip: tuple[float, float], dual_clip: float | None) -> tuple[Tensor, Tensor]:
    """min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A) (arXiv 1707.06347, equation 7), and whether it is the second. (B, A) → (B, A), (B, A).

    Args:
        clip: (ε_low, ε_high); a higher ε_high lets unlikely tokens rise faster (clip-higher, arXiv 2503.14476, section 3.1).
        dual_clip: c > 1, with a negative A never below c·A (arXiv 1912.09729, equation 5); None: off.
    """
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    objective = torch.minimum(plain, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return objective, clipped < plain


def capped_objective(ratio: Tensor, log_probs: Tensor, advantages: Tensor, cap: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """sg[clip(ρ, lowest, highest)]·A·log π (CISPO, arXiv 2506.13585), and where it clips: no token loses its gradient. (B, A)."""
    held = ratio.detach().clamp(*cap)
    return held * advantages * log_probs, held != ratio.detach()


def group_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    corrections: Tensor,
    form: Objective,
) -> LossStats:
    """Σ weight·(−correction·objective + β·KL): the whole loss of a micro-batch. All tensors (B, A).

    The KL as a loss (arXiv 2510.01555): k2 has the gradient of the KL itself where the policy is the one that sampled, k3 one that is
    biased to first order, and k1 one of mean 0; times the ratio, k1's is right for any policy (DeepSeek-V3.2 has k3 so).

    Args:
        weights: of `token_weights`.
        corrections: of `corrections`.
    """
    log_ratio = log_ratios(log_probs, old_log_probs, mask, form.ratio)
    ratio = bounded_exp(log_ratio)
    if form.objective == "clip":
        objective, clipped = clipped_objective(ratio, advantages, form.policy_clip, form.dual_clip)
    else:
        objective, clipped = capped_objective(ratio, log_probs, advantages, form.ratio_cap)
    loss = -(corrections * objective * weights).sum()
    own = (log_probs - old_log_probs) * mask
    sums = {"clip_fraction": (clipped.float() * mask).sum(), "approx_kl": ((bounded_exp(own) - 1 - own) * mask).sum().detach()}
    if form.kl_coefficient:
        kl = kl_estimate(log_probs, reference_log_probs, form.kl_estimator) * (bounded_exp(own) if form.kl_with_ratio else 1.0)
        kl_loss = (kl * weights).sum()
        loss = loss + form.kl_coefficient * kl_loss
        sums["kl_loss"] = kl_loss.detach()
    return LossStats(loss, sums)


def corrections(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, kind: str, low: float, high: float) -> Tensor:
    """Weights that make up for a sampler which is not quite the policy in training, of w = π_old / π_rollout. (B, A) → (B, A).

    none      1
    tis       w, but never below `low` or above `high` (truncated importance sampling)
    icepop    w within [low, high], else 0: the token is left out
    sequence  1, but 0 for a whole answer where the geometric mean of its w lies outside: a product would cut off long answers
    """
    log_weights = (old_log_probs - rollout_log_probs) * mask
    weights = log_weights.exp()
    if kind == "tis":
        return weights.clamp(low, high)
    if kind == "icepop":
        return torch.where((weights >= low) & (weights <= high), weights, 0.0)  # w may be infinite, and 0·∞ is no number
    if kind == "sequence":
        mean = (log_weights.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()
        return ((mean >= low) & (mean <= high)).float().expand_as(mask)
    return torch.ones_like(mask)
