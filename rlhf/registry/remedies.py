"""What to do about a gate that failed, in the keys of params.yaml."""

from __future__ import annotations

# by the stage that makes the policy: which section says how prompts are answered; those that learn from stored answers
SECTIONS = {"ppo": "ppo", "grpo": "grpo", "dpo": "ppo", "best_of_n": "answers", "rrhf": "answers", "iterative": "answers"}
SECTION_OF_STORED = {"best_of_n": "best_of_n", "rrhf": "rrhf", "iterative": "iterative.dpo"}
LEARN_MORE = {
    "ppo": "It learned too little. If gold against KL still rises: more `ppo.steps`, a higher `ppo.actor.learning_rate` or a lower "
    "`ppo.kl.coefficient`. If not, the reward model is at fault: see its held-out accuracy.",
    "grpo": "It learned too little. If gold against KL still rises: more `grpo.steps`, a higher `grpo.actor.learning_rate` or a lower "
    "`grpo.kl.coefficient`. If not, the reward model is at fault: see its held-out accuracy.",
    "dpo": "It learned too little: more `dpo.epochs`, a higher `dpo.optimizer.learning_rate` or a lower `dpo.beta`.",
    **{
        policy: f"It learned too little: more `answers.prompts` or answers to each, or a higher `{section}.optimizer.learning_rate`"
        + (", or more `iterative.rounds`." if policy == "iterative" else ".")
        for policy, section in SECTION_OF_STORED.items()
    },
}
STAY_NEAR = {
    "ppo": "It went far from sft: raise `ppo.kl.coefficient`, or lower `ppo.steps` to where gold against KL is highest.",
    "grpo": "It went far from sft: raise `grpo.kl.coefficient`, or lower `grpo.steps` to where gold against KL is highest.",
    "dpo": "It went far from sft: raise `dpo.beta`, or lower `dpo.epochs`.",
    "iterative": "It went far from sft: raise `iterative.dpo.beta`, or lower `iterative.rounds`.",
    **{policy: f"It went far from sft: lower `{policy}.optimizer.learning_rate` or `{policy}.epochs`." for policy in ("best_of_n", "rrhf")},
}
RETRAIN = (
    "The reward model tells good from bad too rarely: more or cleaner pairs, or other `reward.epochs` and "
    "`reward.optimizer.learning_rate`. Held-out accuracy that falls while accuracy rises means fewer epochs."
)
JUDGE_BETTER = {
    "ppo": RETRAIN,
    "grpo": RETRAIN,
    **dict.fromkeys(SECTION_OF_STORED, RETRAIN),
    "dpo": "Its own preference is wrong too often: more or cleaner pairs, or other `dpo.epochs` and `dpo.beta`.",
}
FOOLED = {
    policy: f"The reward model is pleased and the judge is not: lower `{section}.steps` to where gold against KL turns, raise "
    f"`{section}.kl.coefficient`, or give the reward model more pairs."
    for policy, section in SECTIONS.items()
} | {
    policy: f"The reward model is pleased and the judge is not: lower `{section}.optimizer.learning_rate`, or give the reward model "
    "more pairs."
    for policy, section in SECTION_OF_STORED.items()
}
LEARN_TO_BE_RIGHT = (
    "It is not surely right more often. If accuracy still rises with the steps: more of them, or a higher learning rate. If every answer "
    "to a prompt gets the same reward, there is nothing to learn from it: take easier or harder prompts. More `evaluate.prompts` or "
    "`evaluate.answers` narrow the interval."
)
OF_GATES: dict[str, dict[str, str] | str] = {
    "min_gold_difference": LEARN_MORE,
    "min_win_rate": LEARN_MORE,
    "min_length_controlled_win_rate": "It wins by the length of its answers: see samples, and whether reward model and judge like short or "
    "long ones whatever they say. A reward for length beside (docs/rewards.md), or fewer steps, keep answers as long as they were.",
    "min_reward_accuracy": JUDGE_BETTER,
    "max_kl": STAY_NEAR,
    "max_perplexity_ratio": {
        "ppo": "It forgets plain text: raise `ppo.mixture_coefficient` or `ppo.kl.coefficient`.",
        "grpo": "It forgets plain text: raise `grpo.mixture_coefficient` or `grpo.kl.coefficient`.",
        "dpo": "It forgets plain text: raise `dpo.beta`, or lower `dpo.epochs`.",
        **{
            policy: f"It forgets plain text: lower `{section}.optimizer.learning_rate` or `{section}.epochs`."
            for policy, section in SECTION_OF_STORED.items()
        },
    },
    "min_eos_rate": {
        policy: f"Answers are cut off: raise `{section}.max_answer_tokens`, and see that the demonstrations end within `sft.max_tokens`."
        for policy, section in SECTIONS.items()
    },
    "max_answer_tokens": "Answers grow long, most likely because the longer answer wins in the pairs: add pairs in which it loses, or stay "
    "nearer to sft.",
    "min_accuracy": LEARN_TO_BE_RIGHT,
    "min_accuracy_difference": LEARN_TO_BE_RIGHT,
    "min_champion_accuracy_difference": LEARN_TO_BE_RIGHT,
    "min_kind_accuracy_difference": "It is right less often in the kinds that are named: add prompts of these kinds.",
    "over_optimisation": FOOLED,
    "over_optimisation_accuracy": FOOLED,
    "over_optimisation_champion": FOOLED,
    "min_champion_win_rate": "It is not surely better than the champion. If its win rate is above one half, more `evaluate.prompts` make "
    "it sure; if not, see its worst answers below, and what changed.",
    "min_kind_win_rate": "It became worse in the kinds that are named: see its worst answers below, and add demonstrations and pairs of "
    "these kinds.",
}


def remedy(gate: str, algorithm: str) -> str:
    """What to do about a failed gate of a version that this algorithm trained."""
    said = OF_GATES[gate]
    return said if isinstance(said, str) else said[algorithm]
