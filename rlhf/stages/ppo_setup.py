"""Around stage ppo: its data, its models, its file of rollouts and its clock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedTokenizerBase

from rlhf.config.training import Ppo, peak
from rlhf.data.batches import encode_dialogues
from rlhf.engine.ema import Ema
from rlhf.engine.partition import born, written
from rlhf.engine.setup import frozen, settings, train_engine
from rlhf.errors import UserError
from rlhf.job import Job, read_lines
from rlhf.models import lora
from rlhf.models.policy import check_length, load_policy
from rlhf.models.scalar import ScalarModel, load_scalar


@dataclass
class Models:
    actor: DeepSpeedEngine
    critic: DeepSpeedEngine
    reference: lora.Reference
    reward: ScalarModel
    adapters: lora.Adapters | None  # of the actor
    ema: Ema | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id


def read_prompts(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], int]:
    """The prompts as token ids, and how many were left out as too long.

    Raises:
        UserError: none fits.
    """
    rows = read_lines(job.input("data/prepared/ppo.jsonl"))
    prompts = encode_dialogues(tokenizer, (row["prompt"] for row in rows))
    encoded = [{"row": row, "ids": ids} for row, (ids, _) in zip(rows, prompts, strict=True)]
    fitting = [row for row in encoded if len(row["ids"]) <= job.params.ppo.max_prompt_tokens]
    if not fitting:
        raise UserError(
            f"ppo.max_prompt_tokens: none of {len(rows)} prompts fits in {job.params.ppo.max_prompt_tokens} tokens", remedy="raise it"
        )
    return fitting, len(rows) - len(fitting)


def read_texts(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    width = job.params.ppo.max_prompt_tokens + job.params.ppo.max_answer_tokens
    texts = [row["text"] for row in read_lines(job.input("data/prepared/text.jsonl"))]
    return [[*ids, tokenizer.eos_token_id][:width] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def updates_per_step(params: Ppo) -> int:
    return params.epochs * (params.rollout_batch_size // params.mini_batch_size)


def load_models(job: Job, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Models:
    params, precision = job.params.ppo, job.params.launch.precision
    updates = params.steps * updates_per_step(params)
    warmup = params.critic_warmup_steps * updates_per_step(params)
    with born(settings(job, "reward")):
        reward = load_scalar(job.input("models/reward"), tokenizer, precision)
    reward = frozen(reward, job, "reward", device)
    with born(settings(job, "critic")):
        critic = load_scalar(job.input("models/reward"), tokenizer, precision)
    with torch.no_grad(), written(critic.head.weight):
        critic.head.weight.div_(reward.std)  # in the units of the normalised reward
    lora.attach(critic.model, params.critic_lora, "models/reward", "ppo.critic_lora", job)
    with born(settings(job, "policy")):
        actor = load_policy(job.input("models/sft"), precision)
    check_length(actor, params.max_prompt_tokens + params.max_answer_tokens, "ppo.max_prompt_tokens + ppo.max_answer_tokens")
    adapters = lora.attach(actor, params.actor_lora, "models/sft", "ppo.actor_lora", job)
    engine = train_engine(actor, peak(params.actor, params.actor_lora), job, "policy", params.mini_batch_size, max(1, updates - warmup))
    return Models(
        actor=engine,
        critic=train_engine(critic, peak(params.critic, params.critic_lora), job, "critic", params.mini_batch_size, updates),
        reference=lora.reference(adapters, job, job.input("models/sft"), device),
        reward=reward,
        adapters=adapters,
        ema=Ema(actor, params.ema_decay) if params.ema_decay else None,
        tokenizer=tokenizer,
    )


class Records:
    """The rollouts so far, in a file of the job's folder that rank 0 appends to; what came after the last checkpoint is cut off."""

    def __init__(self, job: Job, checkpointed: int) -> None:
        self.path, self.job, self.bytes = job.folder / "rollouts.jsonl", job, checkpointed
        if job.is_main:
            self.path.touch()
            os.truncate(self.path, checkpointed)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self.job.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
            self.bytes = self.path.stat().st_size


class Clock:
    """Seconds and shares of the phases of a step."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stop(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now

    def report(self, tokens: float) -> dict[str, float]:
        total = sum(self.seconds.values())
        shares = {f"{phase}_share": seconds / total for phase, seconds in self.seconds.items()}
        speeds = {f"{phase}_tokens_per_second": tokens / self.seconds[phase] for phase in ("generation", "training")}
        return {"seconds": total, **shares, **speeds}
