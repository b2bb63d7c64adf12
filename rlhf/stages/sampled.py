"""Answers of a policy that is not trained meanwhile: sampled at stated temperatures, and scored by section rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.engine.distributed import block, equal_micro_batches, join
from rlhf.errors import UserError
from rlhf.job import Job, read_lines
from rlhf.models import lora
from rlhf.models.dialogues import decode_answer, encode_dialogues
from rlhf.models.policy import check_length
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.scoring import Outcome
from rlhf.rollout.experience import Layout
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.weights import policy_weights
from rlhf.stages.answering import closed, load_reward, model_scores, reference_log_probs
from rlhf.stages.rewarding import Rewards


@dataclass(frozen=True)
class Prompt:
    """A prompt, and answers that the data gives to it."""

    number: int  # in the order of all: an answer's seed comes from it
    row: dict[str, Any]
    ids: list[int]
    given: list[tuple[str, list[int]]] = field(default_factory=list)  # where each is from, and its tokens


@dataclass(frozen=True)
class Answer:
    """One answer, and what is said of it."""

    prompt: int  # place among the prompts that were given
    tokens: list[int]  # end token included where it ended by itself
    text: str
    ended: bool
    by: str  # policy; chosen or rejected, where the data gives it
    temperature: float | None = None
    log_prob: float | None = None  # Σ log π(token) at that temperature
    score: float = 0.0  # what is trained on
    kl: float | None = None  # log π(answer) − log π_ref(answer), where it was asked for
    rewards: dict[str, Outcome] = field(default_factory=dict)  # by entry of section rewards


@dataclass
class Sampler:
    """A policy that answers, and what scores its answers. The ranks share the work; each has all answers in the end."""

    job: Job
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    policy: lora.Reference
    reward: ScalarModel | None
    rewards: Rewards

    @classmethod
    def of(cls, job: Job, tokenizer: PreTrainedTokenizerBase, device: torch.device, path: str) -> Sampler:
        """Of the policy at `path`, an input of the stage."""
        policy = lora.reference(None, job, job.input(path), device)
        with policy() as model:
            check_length(model, job.params.answers.longest, "answers.max_prompt_tokens + answers.max_answer_tokens + 1")
        reward = load_reward(job, tokenizer, device) if job.params.trains_reward else None
        return cls(job, tokenizer, device, policy, reward, Rewards.of(job))

    def sample(self, prompts: Sequence[Prompt], temperature: float, times: int, seed: Callable[..., int]) -> list[Answer]:
        """So many answers to each prompt."""
        own, job = self.job.params.answers, self.job
        asked = [(place, time) for place in range(len(prompts)) for time in range(times)]
        mine = self._own(asked)
        ids = {"eos_id": self.tokenizer.eos_token_id, "pad_id": self.tokenizer.pad_token_id}
        sampling = Sampling(temperature, own.top_k, own.top_p, own.max_answer_tokens)
        seeds = [seed("answer", prompts[place].number, temperature, time) for place, time in mine]
        rollout = job.params.launch.rollout
        with self.policy() as model, policy_weights(model, rollout.gather) as together:
            made = generate(
                model, [prompts[place].ids for place, _ in mine], seeds, sampling, **ids, slots=rollout.slots, together=together
            )
        found = [
            Answer(place, tokens, decode_answer(self.tokenizer, tokens), ended, "policy", temperature, sum(log_probs))
            for (place, _), tokens, ended, log_probs in zip(mine, made.answers, made.ended, made.log_probs, strict=True)
        ]
        return join(found, job)[: len(asked)]

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], step: int, reference: lora.Reference | None = None
    ) -> list[Answer]:
        """The answers with their scores, and with their KL to a reference where one is given.

        Raises:
            UserError: an entry of section rewards failed on too many.
        """
        job, mine, own = self.job, self._own(list(answers)), self.job.params.answers
        asked = self.rewards.begin([prompts[one.prompt].row for one in mine], [one.text for one in mine])
        scores, distances = [[0.0] * len(mine) for _ in range(2)]
        needed = self.reward is not None or reference is not None
        parts = (
            equal_micro_batches(range(len(mine)), lambda i: len(prompts[mine[i].prompt].ids) + len(mine[i].tokens), job) if needed else []
        )
        for part in parts:
            before = [prompts[mine[i].prompt].ids for i in part]
            sequences = [ids + mine[i].tokens for i, ids in zip(part, before, strict=True)]
            width, closings = max(len(mine[i].tokens) for i in part), closed([mine[i].ended for i in part], self.tokenizer)
            at = Layout.of(sequences, list(map(len, before)), width, self.device, closings)
            if self.reward is not None:
                for i, value in zip(part, model_scores(self.reward, at).tolist(), strict=True):
                    scores[i] = value
            if reference is not None:
                known = reference_log_probs(reference, at, mine[part[0]].temperature or 1.0).sum(-1).tolist()
                for i, value in zip(part, known, strict=True):
                    distances[i] = (mine[i].log_prob or 0.0) - value
        outcomes = self.rewards.collect(asked)
        scored = []
        for i, one in enumerate(mine):
            given = {name: of_all[i] for name, of_all in outcomes.items()}
            total, rewards = self.rewards.summed(given, [scores[i]] if self.reward is not None else [])
            if not one.ended:
                total = total - own.missing_eos_penalty if own.no_eos_reward is None else own.no_eos_reward
            scored.append(replace(one, score=total, rewards=rewards, kl=distances[i] if reference is not None else one.kl))
        everyone = join(scored, job)[: len(answers)]
        made = [one for one in everyone if one.by == "policy"]
        self.rewards.check(job, step, [one.rewards for one in everyone], [one.score for one in made], [one.ended for one in made])
        return everyone

    def given(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers that the data gives."""
        answers = [(place, *given) for place, prompt in enumerate(prompts) for given in prompt.given]
        return [Answer(place, tokens, decode_answer(self.tokenizer, tokens), True, by) for place, by, tokens in answers]

    def _own(self, rows: list[Any]) -> list[Any]:
        """This rank's part: as many for each, so that some stand there twice."""
        even = [rows[i % len(rows)] for i in range(len(rows) + -len(rows) % self.job.world_size)]
        return block(even, self.job, "answers.batch_size")

    def close(self) -> None:
        self.rewards.checkers.close()


def line(prompt: Prompt, answers: Sequence[Answer], *, several: bool) -> dict[str, Any]:
    """A prompt and its answers, as a file holds them.

    Args:
        several: rewards, whose scores then stand there one by one.
    """
    said = []
    for one in answers:
        found = {"answer": one.text, "by": one.by, "temperature": one.temperature, "ended": one.ended, "score": one.score}
        each = {"rewards": {name: outcome.score for name, outcome in one.rewards.items()}} if several else {}
        said.append({**found, **each, "tokens": one.tokens})
    return {**prompt.row, "prompt_tokens": prompt.ids, "answers": said}


# ---------------------------------------------------------------------------------------------------------------- prompts


def read_prompts(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The different prompts that are short enough, in their order on the disk."""
    first = {json.dumps(row["prompt"]): row for row in reversed(read_lines(job.input("data/prepared/ppo.jsonl")))}
    rows = list(reversed(first.values()))
    encoded = encode_dialogues(tokenizer, (row["prompt"] for row in rows))
    limit = job.params.answers.max_prompt_tokens
    return [Prompt(number, row, ids) for number, (row, (ids, _)) in enumerate(zip(rows, encoded, strict=True)) if len(ids) <= limit]


def read_given(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of the preference pairs, with the answers given there that are short enough."""
    limits = job.params.answers
    pairs = read_lines(job.input("data/prepared/reward.jsonl"))
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for row in pairs:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).extend((side, row[side]) for side in ("chosen", "rejected"))
    found = []
    for number, (text, given) in enumerate(by_prompt.items()):
        prompt = json.loads(text)
        different = list({answer: (side, answer) for side, answer in given}.values())
        said = ([*prompt, {"role": "assistant", "content": answer}] for _, answer in different)
        (ids, _), *encoded = encode_dialogues(tokenizer, [prompt, *said])
        answers = [(side, tokens[len(mask) - mask[::-1].index(0) :]) for (side, _), (tokens, mask) in zip(different, encoded, strict=True)]
        short = [(side, tokens) for side, tokens in answers if len(tokens) <= limits.max_answer_tokens]
        if len(ids) <= limits.max_prompt_tokens:
            found.append(Prompt(-1 - number, {"prompt": prompt, "gold": None}, ids, short))  # below 0: numbers of no other prompt
    return found


def dealt(prompts: Sequence[Prompt], first: int, count: int, what: str, job: Job) -> list[Prompt]:
    """So many prompts from a place on in the seeded order, which hangs on nothing but the prompts.

    Raises:
        UserError: there are too few.
    """
    if first + count > len(prompts):
        said = f"{what} from number {first} on are asked for, but {len(prompts)} different ones are short enough"
        raise UserError(f"stage {job.stage}: {count} {said}", remedy="give more of them, or lower answers.prompts or answers.pairs")
    order = list(range(len(prompts)))
    replace(job, stage="answers").random("order", what).shuffle(order)
    return [prompts[i] for i in order[first : first + count]]


def measure(sampler: Sampler, prompts: Sequence[Prompt], reference: lora.Reference | None) -> list[Answer]:
    """An answer to each held-out prompt, scored, with the same seeds for every policy."""
    job = sampler.job
    made = sampler.sample(prompts, job.params.answers.temperatures[0], 1, replace(job, stage="answers").seed)
    return sampler.score(prompts, made, 0, reference)


def as_rollout(number: int, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """A held-out answer of the policy of so many rounds, as data/rollouts.jsonl has the answers in the course of training."""
    return {"step": number, **prompt.row, "answer": answer.text, "ended": answer.ended, "kl": answer.kl or 0.0, "score": answer.score}
