"""Several answers of versions to given prompts, by the project's own engine, as pairs to be rated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.feedback.pairs import Written
from rlhf.models.dialogues import decode_answer, encode_prompt
from rlhf.models.policy import context_tokens, load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling

Prompt = list[dict[str, str]]


def sampling_of(params: Params, temperature: float) -> dict[str, Any]:
    """How answers are sampled, as the record keeps it."""
    return {"temperature": temperature, "top_p": 1.0, "max_tokens": params.serving.max_tokens}


def answers(folder: Path, version: str, prompts: Sequence[Prompt], params: Params, temperature: float, times: int) -> list[list[Written]]:
    """So many answers to each prompt, each from a seed of its own; those that were cut off are left out.

    Args:
        folder: of the version's model.
        version: its name.

    Raises:
        UserError: a prompt is too long for the model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_policy(folder, "fp32" if device == "cpu" else "bf16")
    model.to(device)
    tokenizer = load_tokenizer(folder)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    room = context_tokens(model) - params.serving.max_tokens
    for number, prompt in enumerate(ids, start=1):
        if len(prompt) > room:
            what = f"prompt {number} has {len(prompt)} tokens, and {version} takes {room} before an answer of serving.max_tokens"
            raise UserError(what, remedy="leave it out, or lower serving.max_tokens")
    seeds = [random.Random(f"{params.seed}/{version}/{number}").getrandbits(62) for number in range(len(ids) * times)]
    made = generate(
        model,
        [prompt for prompt in ids for _ in range(times)],
        seeds,
        Sampling(temperature, 0, 1.0, params.serving.max_tokens),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        slots=params.launch.rollout.slots,
    )
    found: list[list[Written]] = [[] for _ in prompts]
    for number, (answer, ended, seed) in enumerate(zip(made.answers, made.ended, seeds, strict=True)):
        if ended:
            found[number // times].append(Written(decode_answer(tokenizer, answer), version, seed))
    return found
