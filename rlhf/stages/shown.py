"""What stage evaluate writes of its numbers and answers, for people and for what decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def summary(metrics: dict[str, Any], new: str) -> dict[str, float]:
    """What decides, as `dvc metrics` and `dvc exp` show it: the numbers that the gates look at, and what may deceive them, on one level."""
    gold, accuracy, reward = metrics["gold"], metrics.get("accuracy"), metrics["reward_model"]
    return {
        **({"accuracy": accuracy[new]["value"], "accuracy_difference_low": accuracy["ci95"][0]} if accuracy else {}),
        **({"gold": gold[new], "gold_difference": gold["difference"], "gold_difference_low": gold["ci95"][0]} if gold else {}),
        "win_rate": metrics["win_rate"]["value"],
        "win_rate_low": metrics["win_rate"]["ci95"][0],
        "win_rate_length_controlled": metrics["win_rate"]["length_controlled"]["value"],
        **({"reward_accuracy": reward["accuracy"], "reward_calibration_error": reward["calibration"]["error"]} if reward else {}),
        "kl": metrics["kl"],
        "perplexity_ratio": metrics["perplexity"]["ratio"],
        "eos_rate": metrics["eos_rate"][new],
        "answer_tokens": metrics["answer_tokens"][new],
        "refusals": metrics["refusals"][new],
        "repetitions": metrics["repetitions"][new],
    }


def all_answers(
    prompts: Sequence[dict[str, Any]],
    answers: dict[str, list[str]],
    scores: dict[str, list[float]],
    rewards: dict[str, list[float]],
    right: dict[str, dict[int, list[bool]]],
    ended: dict[str, list[bool]],
) -> list[dict[str, Any]]:
    """A line per held-out prompt: both answers, the judge's scores and the reward model's (none after dpo), what ended by itself, and
    what is right."""
    columns: dict[str, dict[str, list[Any]]] = {"answers": answers, "scores": scores, "rewards": rewards, "ended": ended}
    lines = [{**row, **{key: {name: by[name][i] for name in by} for key, by in columns.items()}} for i, row in enumerate(prompts)]
    return [line | ({"right": {name: by[i] for name, by in right.items() if i in by}} if right else {}) for i, line in enumerate(lines)]


def samples(prompts: Sequence[dict[str, Any]], answers: dict[str, list[str]], scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], **{name: answers[name][i] for name in answers}, "scores": {name: scores[name][i] for name in scores}}
        for i, row in enumerate(prompts)
    ]


def table(prompts: Sequence[dict[str, Any]], answers: dict[str, list[str]], scores: dict[str, list[float]], count: int) -> list[str]:
    """Some prompts with both answers, as lines."""
    lines = []
    for i in range(min(count, len(prompts))):
        lines.append(f"prompt: {prompts[i]['prompt'][-1]['content']}")
        lines += [f"    {name} ({scores[name][i]:.2f}): {answers[name][i]}" for name in answers]
    return lines
