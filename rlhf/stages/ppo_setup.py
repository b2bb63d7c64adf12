"""Around stage ppo: its data, its models, its file of rollouts and the report of a step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.training import Ppo, peak
from rlhf.engine.distributed import gather
from rlhf.engine.ema import Ema
from rlhf.engine.partition import born, written
from rlhf.engine.setup import frozen, settings, train_engine
from rlhf.engine.speed import Clock, Products, matrix_rate, peak_memory
from rlhf.errors import UserError
from rlhf.job import Job, read_lines
from rlhf.models import lora
from rlhf.models.contents import encode_passages
from rlhf.models.dialogues import decode_answer, encode_dialogues
from rlhf.models.policy import DTYPES, check_length, load_policy
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.rollout.experience import Experience


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
    return [[*ids, tokenizer.eos_token_id][:width] for ids in encode_passages(tokenizer, texts)]


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
    engine = train_engine(actor, peak(params.actor, params.actor_lora), job, "policy", max(1, updates - warmup))
    return Models(
        actor=engine,
        critic=train_engine(critic, peak(params.critic, params.critic_lora), job, "critic", updates),
        reference=lora.reference(adapters, job, job.input("models/sft"), device),
        reward=reward,
        adapters=adapters,
        ema=Ema(actor, params.ema_decay) if params.ema_decay else None,
        tokenizer=tokenizer,
    )


class Records:
    """The rollouts so far, in a file of the job's folder that rank 0 appends to; what came after the last checkpoint is cut off."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, checkpointed: int) -> None:
        self.path, self.job, self.bytes = job.folder / "rollouts.jsonl", job, checkpointed
        self.tokenizer = tokenizer
        if job.is_main:
            self.path.touch()
            os.truncate(self.path, checkpointed)

    def add(self, step: int, rows: Sequence[Mapping[str, Any]], e: Experience, kl: Tensor) -> None:
        """Add the answers of a step.

        Args:
            rows: of the prompts, in the order of the experience.
            kl: of each answer to the reference (B,).
        """
        if not self.job.is_main:
            return
        found = zip(rows, e.sequences, e.prompt_lengths, kl.tolist(), e.scores.tolist(), strict=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row, ids, length, distance, score in found:
                answer = decode_answer(self.tokenizer, ids[length:])
                line = {"step": step, **row, "answer": answer, "kl": distance, "score": score}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.bytes = self.path.stat().st_size


class Report:
    """What a step cost, for the log alone."""

    def __init__(self, job: Job, models: Models, device: torch.device) -> None:
        self.job, self.device = job, device
        self.rate = matrix_rate(device, DTYPES[job.params.launch.precision]) * job.world_size
        with models.reference() as reference:
            scoring = [Products.of(reference), Products.of(models.critic.module), Products.of(models.reward)]
        # in half precision the actor says anew what it thinks of its answers
        self.scoring = scoring if job.params.launch.precision == "fp32" else [*scoring, Products.of(models.actor.module)]
        self.actor, self.critic = Products.of(models.actor.module), Products.of(models.critic.module)

    def of(self, clock: Clock, e: Experience, rows: Sequence[int], texts: Sequence[list[int]], *, actor_learns: bool) -> dict[str, float]:
        """Seconds and tokens per second of the phases, the share of the machine's rate that all their products come to, and memory.

        All ranks must call it.

        Args:
            rows: of the experience, as often as they were learnt from.
            texts: that were learnt from.
        """
        sizes, answers = [len(sequence) for sequence in e.sequences], e.mask.sum(-1).tolist()
        tokens, answer_tokens, text_tokens = sum(sizes), sum(answers), sum(map(len, texts))
        learnt, learnt_answers = sum(sizes[row] for row in rows), sum(answers[row] for row in rows)
        operations = [model.forward(tokens, answer_tokens) for model in (self.actor, *self.scoring)]
        operations.append(self.critic.training(learnt))
        if actor_learns:
            operations.append(self.actor.training(learnt + text_tokens, learnt_answers + text_tokens))
        return {
            **clock.report({"generation": answer_tokens, "scoring": tokens, "training": learnt + text_tokens}),
            "flops_utilisation": sum(operations) / clock.total / self.rate,
            "peak_memory_gib": max(gather([peak_memory(self.device)], self.job)),
        }
