"""What each name of an algorithm stands for: the values that `rlhf use PRESET algorithm=NAME` writes into section grpo.

Nothing else reads them: training goes by the values of params.yaml, which may be changed afterwards. What a paper leaves to the model at
hand (learning rate, batch sizes, lengths) is not among them; where papers and public code differ, the source is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Algorithm = Literal[
    "ppo", "dpo", "rloo", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "reinforce++", "reinforce++-baseline", "remax", "opo",
    "best-of-n", "rrhf", "iterative",
]  # fmt: skip
NAMES: tuple[Algorithm, ...] = get_args(Algorithm)
WHOLE_ROLLOUT = "rollout_batch_size"  # in the place of a value: that of this key

_OFF: dict[str, Any] = {
    "answers_per_prompt": 8,  # as TRL has it; papers have from 2 to 64
    "epochs": 1,
    "baseline": "mean",
    "scale": "none",
    "scale_epsilon": 1e-4,  # as TRL has it
    "gamma": 1.0,
    "ratio": "token",
    "objective": "clip",
    "policy_clip": [0.2, 0.2],
    "dual_clip": None,
    "ratio_cap": [0.0, 5.0],
    "normaliser": "tokens",
    "normaliser_tokens": None,
    "kl.where": "none",
    "kl.coefficient": 0.0,
    "kl.estimator": "k3",
    "kl.with_ratio": False,
    "reference_every": None,
    "overlong": None,
    "resample_rounds": 0,
    "mismatch.correction": "none",
}

VALUES: dict[str, dict[str, Any]] = {
    # arXiv 2402.14740: β·KL off the reward before the baseline, k 4, β 0.03; sequence ratio and clip as in TRL's RLOOTrainer
    "rloo": _OFF
    | {
        "answers_per_prompt": 4,
        "baseline": "leave-one-out",
        "ratio": "sequence-sum",
        "normaliser": "answers",
        "kl.where": "answer",
        "kl.coefficient": 0.03,
        "kl.estimator": "k1",
    },
    # arXiv 2402.03300, section 4.1: k3 in the loss, β 0.04, mean over each answer
    "grpo": _OFF | {"scale": "group", "normaliser": "answers", "kl.where": "loss", "kl.coefficient": 0.04},
    # arXiv 2503.20783: neither standard deviation nor length, L the longest answer; β 0
    "dr-grpo": _OFF | {"normaliser": "constant"},
    # arXiv 2503.14476 and verl's recipe: clip-higher, token mean, dynamic sampling in 10 rounds at most, no KL. `overlong` needs a buffer
    # that suits the answers (4096 of 20480 there): it stays off
    "dapo": _OFF | {"scale": "group", "policy_clip": [0.2, 0.28], "resample_rounds": 10},
    # arXiv 2507.18071, section 5.1: ranges of another order, as the ratio is a mean over the answer; no KL
    "gspo": _OFF | {"scale": "group", "ratio": "sequence-mean", "normaliser": "answers", "policy_clip": [3e-4, 4e-4]},
    # arXiv 2506.13585: no lower bound, token mean, no KL; the cap 5 is that of arXiv 2510.13786
    "cispo": _OFF | {"scale": "group", "objective": "cispo"},
    # arXiv 2501.03262: one answer, k1 in each token's reward, whitened over the batch; β as in OpenRLHF's examples
    "reinforce++": _OFF
    | {
        "answers_per_prompt": 1,
        "baseline": "none",
        "scale": "batch",
        "kl.where": "token",
        "kl.coefficient": 0.01,
        "kl.estimator": "k1",
    },
    # arXiv 2501.03262: group mean, then whitened over the batch; k2 as a loss, β as in OpenRLHF's examples
    "reinforce++-baseline": _OFF | {"scale": "batch", "kl.where": "loss", "kl.coefficient": 0.001, "kl.estimator": "k2"},
    # arXiv 2310.10505: one answer and the greedy one; k1 in each token's reward
    "remax": _OFF
    | {
        "answers_per_prompt": 1,
        "baseline": "greedy",
        "normaliser": "sequences",
        "kl.where": "token",
        "kl.coefficient": 0.05,
        "kl.estimator": "k1",
    },
    # arXiv 2505.23585: exactly on-policy, neither standard deviation nor KL
    "opo": _OFF | {"baseline": "length-weighted", "mini_batch_size": WHOLE_ROLLOUT},
}


def policy_stage(algorithm: str) -> str:
    """The stage that makes the policy; so are its section, its graph and its model named."""
    return "grpo" if algorithm in VALUES else algorithm.replace("-", "_")


def values(algorithm: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key what an algorithm's name stands for, given the rest of section grpo; nothing for those of other sections."""
    found = VALUES.get(algorithm, {})
    return {key: section[value] if value == WHOLE_ROLLOUT else value for key, value in found.items()}
