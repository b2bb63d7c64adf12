"""Direct preference optimisation: the policy learns from pairs as if it were its own reward model (arXiv 2305.18290).

The implicit reward of an answer is β·(log π(answer) − log π_ref(answer)); h is the difference of those brackets, chosen − rejected.

    sigmoid   −(1 − ε)·log σ(β·h) − ε·log σ(−β·h)     equation 7; ε > 0 is conservative DPO, which takes a share ε of labels to be wrong
    ipo       (h − 1 / (2β))²                          arXiv 2310.12036, equation 17: h has a target, and does not grow without bound
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], loss: str, beta: float, label_smoothing: float, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on a batch of pairs.

    Args:
        policy, reference: log-probabilities of the chosen and of the rejected answers, sums over an answer's tokens, each (B,). With a
            reference of zeros the loss is reference-free.
        loss: sigmoid or ipo.
        denominator: pairs in the whole global batch, so that the loss does not depend on how it is cut.

    Returns:
        scalar loss; sums over the rows given, for the caller to divide
    """
    chosen, rejected = (log_probs.float() - before.float() for log_probs, before in zip(policy, reference, strict=True))
    difference = chosen - rejected
    if loss == "ipo":
        per_pair = (difference - 1 / (2 * beta)) ** 2
    else:
        per_pair = -(1 - label_smoothing) * F.logsigmoid(beta * difference) - label_smoothing * F.logsigmoid(-beta * difference)
    stats = {
        "accuracy": (difference > 0).float(),
        "margin": beta * difference,
        "chosen_reward": beta * chosen,
        "rejected_reward": beta * rejected,
    }
    return per_pair.sum() / denominator, {name: value.detach().sum() for name, value in stats.items()}
