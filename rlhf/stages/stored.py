"""The last step's answers, kept beside the checkpoints; and training from them alone, without sampling (`rlhf launch STAGE --from`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.rollout.experience import Scored
from rlhf.rollout.generate import Rollouts

FILE = "rollout.pt"  # in the job's folder


def save(job: Job, step: int, groups: Sequence[tuple[Mapping[str, Any], Sequence[Scored]]]) -> None:
    """Keep the answers of a step, in the place of those before.

    Args:
        groups: the row of each prompt, and its answers; where the likeliest one is the baseline, that last.
    """
    if not job.is_main or job.rollouts:
        return
    content = []
    for row, answers in groups:
        said = [[one.answer, one.ended, one.rollout_log_probs.tolist()] for one in answers]
        content.append({"row": dict(row), "ids": answers[0].prompt, "answers": said})
    beside = job.folder / f"{FILE}.new"
    torch.save({"stage": job.stage, "step": step, "prompts": content}, beside)
    beside.rename(job.folder / FILE)


def load(job: Job, path: Path) -> list[dict[str, Any]]:
    """The prompts of a stored step, each with its answers.

    Raises:
        UserError: the file holds no such, or those of another stage.
    """
    try:
        content = torch.load(path, weights_only=True)
        stage, step, prompts = content["stage"], content["step"], list(content["prompts"])
        for prompt in prompts:
            if not (prompt["row"]["prompt"] and prompt["ids"] and prompt["answers"] and all(map(_is_answer, prompt["answers"]))):
                raise ValueError("a prompt or an answer of it is empty")
        if not prompts:
            raise ValueError("there is no prompt")
    except Exception as error:  # torch raises what it stumbles over
        what = f"{path} holds no stored answers: {type(error).__name__}"
        raise UserError(what, remedy=f"give runs/{job.stage}/FINGERPRINT/{FILE}, which the stage writes in each step") from None
    if stage != job.stage:
        raise UserError(f"{path} holds answers of stage {stage}, not of {job.stage}", remedy=f"`rlhf launch {stage} --from {path}`")
    job.say(f"trains from the answers of step {step} alone, {len(prompts)} prompts of {path}; nothing is sampled or published")
    return prompts


def _is_answer(stored: Sequence[Any]) -> bool:
    """Whether an answer has tokens, and a number for each."""
    ids, _, log_probs = stored
    return len(ids) == len(log_probs) > 0


def replay(prompts: Sequence[Mapping[str, Any]], numbers: Sequence[int], step: int) -> Rollouts:
    """Stored answers in the place of sampled ones.

    Args:
        numbers: which answer of each prompt; the first of those that are there, again, where there are fewer.
    """
    found = [prompt["answers"][number % len(prompt["answers"])] for prompt, number in zip(prompts, numbers, strict=True)]
    answers, ended, log_probs = (list(column) for column in zip(*found, strict=True))
    return Rollouts([prompt["ids"] for prompt in prompts], answers, log_probs, ["eos" if done else "length" for done in ended], step)
