"""What a stage that learns from its own answers keeps of a step, the file of rollouts and the report of its cost; what it hands on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.engine.distributed import gather
from rlhf.engine.speed import Clock, Products, matrix_rate, peak_memory
from rlhf.job import Job
from rlhf.models import saving
from rlhf.models.dialogues import decode_answer
from rlhf.models.policy import DTYPES
from rlhf.rollout.experience import Experience
from rlhf.stages.answering import Models
from rlhf.stages.updates import Batch


class Records:
    """The rollouts so far, in a file of the job's folder that rank 0 appends to; what came after the last checkpoint is cut off."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, checkpointed: int) -> None:
        self.path, self.job, self.bytes = job.folder / "rollouts.jsonl", job, checkpointed
        self.tokenizer = tokenizer
        if job.is_main:
            self.path.touch()
            os.truncate(self.path, checkpointed)

    def add(self, step: int, rows: Sequence[Mapping[str, Any]], e: Experience, kl: Tensor | None) -> None:
        """Add the answers of a step.

        Args:
            rows: of the prompts, in the order of the experience.
            kl: of each answer to the reference (B,); None where there is none.
        """
        if not self.job.is_main:
            return
        distances = [None] * len(rows) if kl is None else kl.tolist()
        found = zip(rows, e.sequences, e.prompt_lengths, e.ended.tolist(), distances, e.scores.tolist(), strict=True)
        with self.path.open("a", encoding="utf-8") as file:
            for number, (row, ids, length, ended, distance, score) in enumerate(found):
                answer = decode_answer(self.tokenizer, ids[length:])
                line = {"step": step, **row, "answer": answer, "ended": ended, "kl": distance, "score": score}
                if len(self.job.params.rewards) > 1:
                    line["rewards"] = {name: outcome.score for name, outcome in e.rewards[number].items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.bytes = self.path.stat().st_size


def hand_on(job: Job, models: Models, records: Records) -> None:
    """Write the policy, or its average where there is one, and all answers that it learnt from."""
    models.rewards.checkers.close()
    if models.ema:
        models.ema.copy_to(models.actor.module)
    saving.save(job, models.actor.module, models.tokenizer, job.output(f"models/{job.stage}"), models.adapters)
    if job.is_main:
        shutil.copyfile(records.path, job.output("data/rollouts.jsonl"))


class Report:
    """What a step cost, for the log alone."""

    def __init__(self, job: Job, models: Models, device: torch.device, critic: DeepSpeedEngine | None = None) -> None:
        self.job, self.device = job, device
        self.rate = matrix_rate(device, DTYPES[job.params.launch.precision]) * job.world_size
        self.actor, self.critic = Products.of(models.actor.module), Products.of(critic.module) if critic else None
        self.scoring = [*([Products.of(models.reward)] if models.reward else []), *([self.critic] if self.critic else [])]
        if models.reference:
            with models.reference() as reference:
                self.scoring.append(Products.of(reference))
        if job.params.launch.precision != "fp32":  # the actor says anew what it thinks of its answers
            self.scoring.append(self.actor)

    def of(self, clock: Clock, made: Experience, e: Experience, batches: Sequence[Batch], *, actor_learns: bool = True) -> dict[str, float]:
        """Seconds and tokens per second of the phases, the share of the machine's rate that all their products come to, and memory.

        All ranks must call it.

        Args:
            made: all that was sampled and scored.
            e, batches: what there was to learn from, and the batches of it that were.
        """
        sizes, answers = [len(sequence) for sequence in e.sequences], e.mask.sum(-1).tolist()
        rows = [row for batch in batches for row in batch.rows]
        tokens, answer_tokens = sum(map(len, made.sequences)), made.mask.sum().item()
        text_tokens = sum(len(text) for batch in batches for text in batch.texts)
        learnt, learnt_answers = sum(sizes[row] for row in rows), sum(answers[row] for row in rows)
        operations = [model.forward(tokens, answer_tokens) for model in (self.actor, *self.scoring)]
        if self.critic:
            operations.append(self.critic.training(learnt))
        if actor_learns:
            operations.append(self.actor.training(learnt + text_tokens, learnt_answers + text_tokens))
        sampled = {} if self.job.rollouts else {"generation": answer_tokens}
        return {
            **clock.report({**sampled, "scoring": tokens, "training": learnt + text_tokens}),
            "flops_utilisation": sum(operations) / clock.total / self.rate,
            "peak_memory_gib": max(gather([peak_memory(self.device)], self.job)),
        }
