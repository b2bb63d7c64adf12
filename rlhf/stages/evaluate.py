"""Stage evaluate: the new policy against sft on held-out data, judged by something that training did not optimise.

Where every held-out prompt has a gold score (the sandbox), that is the judge. Elsewhere a second reward model is trained here, on pairs of
the judge slice that no other stage saw, and decides which answer wins.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import COURSE
from rlhf.data import sandbox
from rlhf.engine.distributed import gather, layout, micro_batches, start
from rlhf.engine.partition import born
from rlhf.engine.setup import frozen, settings
from rlhf.job import Job, read_lines, run, write_lines
from rlhf.models import lora
from rlhf.models.contents import encode_passages
from rlhf.models.dialogues import decode_answer, encode_dialogue, encode_prompt, short_enough
from rlhf.models.packed import pack
from rlhf.models.policy import check_length, load_policy, logits_at
from rlhf.models.scalar import ScalarModel, load_scalar, save_scalar
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.generate import Rollouts, generate
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.weights import policy_weights
from rlhf.stages import checking, dpo, measures, reward, shown
from rlhf.stages.language_model import perplexity
from rlhf.tensors import token_log_probs

ANSWERS = "data/answers.jsonl"
JUDGE = "models/judge"
JUDGED_ROLLOUTS = 5000  # at most so many answers of the course of training are judged for the plot


def main(job: Job) -> None:
    device = start(job)
    params = job.params.evaluate
    tokenizer = load_tokenizer(job.input("models/sft"))
    heldout_prompts = read_lines(job.input("data/prepared/heldout_prompts.jsonl"))
    prompts = short_enough(tokenizer, heldout_prompts, job.params.answering.max_prompt_tokens)[: params.prompts]
    new = job.params.policy
    policies = {name: frozen_policy(job, job.input(f"models/{name}"), device) for name in ("sft", new)}
    for policy in policies.values():
        check_length(policy, job.params.answering.longest, f"{job.params.answering_key}.max_prompt_tokens + max_answer_tokens + 1")

    # 1. both models answer the same held-out prompts
    rollouts = {name: answer(job, policies[name], tokenizer, prompts) for name in policies}
    answers = {name: [decode_answer(tokenizer, ids) for ids in rollouts[name].answers] for name in policies}
    ended = {name: rollouts[name].ended for name in rollouts}
    # 2. the judge scores the answers
    judge = make_judge(job, tokenizer)
    scores = {name: judge.score(prompts, answers[name]) for name in policies}
    # 3. numbers
    rewards: dict[str, list[float]] = {}
    reward_model: dict[str, Any] | None = None
    if job.params.trains_reward:
        reward_model, rewards = measure_reward_model(job, tokenizer, prompts, answers, device)
    elif new == "dpo":
        reward_model = measure_implicit_reward(job, tokenizer, policies)
    metrics = {
        "gold": gold_summary(job, prompts, scores) if job.params.data.has_gold else None,
        "win_rate": {**win_rate(job, scores, rollouts), "judge": judge.name},
        "reward_model": reward_model,
        "kl": kl(job, policies, rollouts[new]),
        "perplexity": perplexities(job, policies, tokenizer),
        "eos_rate": {name: statistics.fmean(ended[name]) for name in ended},
        "answer_tokens": {name: statistics.fmean(map(len, rollouts[name].answers)) for name in rollouts},
        **measures.shares(answers),
        "prompts": len(prompts),
        "temperature": params.temperature,
        "heldout": heldout(job, prompts),
    }
    right: dict[str, dict[int, list[bool]]] = {}
    if checking.checkers_of(job):
        several = {name: several_answers(job, policies[name], tokenizer, prompts, answers[name]) for name in policies}
        metrics["accuracy"], right = checking.measure(job, prompts, several, new, partial(bootstrap, job))
    has_course = new in COURSE
    judged = course(job, judge.score) if has_course else []
    # 4. outputs
    fingerprint = judge.save(job, tokenizer)
    if job.is_main:
        job.write_metrics({**metrics, "judge": fingerprint})
        job.write_metrics(shown.summary(metrics, new), "summary")
        write_lines(job.output(ANSWERS), shown.all_answers(prompts, answers, scores, rewards, right, ended))
        write_lines(job.output("data/samples.jsonl"), shown.samples(prompts, answers, scores)[: params.shown])
        if has_course:
            job.write_plot("plots/gold_against_kl.csv", judged)
        for line in shown.table(prompts, answers, scores, params.shown):
            job.say(line)


# ---------------------------------------------------------------------------------------------------------------- models


def frozen_policy(job: Job, folder: Path, device: torch.device) -> PreTrainedModel:
    """A policy to sample and score with, held as launch.engines.reference says.

    Raises:
        UserError: the folder holds none.
    """
    with born(settings(job, "reference")):
        policy = load_policy(folder, job.params.launch.precision)
    return frozen(policy, job, "reference", device)


def frozen_scalar(job: Job, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> ScalarModel:
    """A reward model to score with, held as launch.engines.reward says."""
    with born(settings(job, "reward")):
        model = load_scalar(job.input(path), tokenizer, job.params.launch.precision)
    return frozen(model, job, "reward", device)


# --------------------------------------------------------------------------------------------------------------- answers


def answer(
    job: Job, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[dict[str, Any]], again: int = 0
) -> Rollouts:
    """Sample one answer per prompt, with the same seeds for every policy; the ranks share the prompts.

    Args:
        again: how often they were asked before, which gives other answers.
    """
    params = job.params.evaluate
    sampling = Sampling(params.temperature, 0, 1.0, job.params.answering.max_answer_tokens)
    mine = list(enumerate(prompts))[job.rank :: job.world_size]
    ids = [encode_prompt(tokenizer, row["prompt"]) for _, row in mine]
    seeds = [job.seed("answer", number, *([again] if again else [])) for number, _ in mine]
    rollout = job.params.launch.rollout
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    with policy_weights(policy, rollout.gather) as together:
        rollouts = generate(policy, ids, seeds, sampling, **ends, slots=rollout.slots, together=together)
    found = list(zip(rollouts.prompts, rollouts.answers, rollouts.log_probs, rollouts.finish, strict=True))
    texts, answers, log_probs, finish = (list(column) for column in zip(*gather(found, job), strict=True))
    return Rollouts(texts, answers, log_probs, finish, policy_version=0)


def several_answers(
    job: Job, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[dict[str, Any]], first: Sequence[str]
) -> list[list[str]]:
    """As many answers to each prompt as params say, its first among them."""
    more = [answer(job, policy, tokenizer, prompts, again).answers for again in range(1, job.params.evaluate.answers)]
    return [[said, *(decode_answer(tokenizer, ids[i]) for ids in more)] for i, said in enumerate(first)]


# ---------------------------------------------------------------------------------------------------------------- judges

ScoreAll = Callable[[Sequence[dict[str, Any]], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Judge:
    """What decides which answer is better: `score` takes held-out rows and an answer to each. The gold score has no `model`."""

    name: str
    score: ScoreAll
    model: ScalarModel | None = None
    adapters: lora.Adapters | None = None
    identity: str | None = None  # of functions and services: a hash of all that decides a score

    def save(self, job: Job, tokenizer: PreTrainedTokenizerBase) -> str:
        """Write models/judge, so that other models' answers can be judged later; returns a hash of all that decides a score."""
        folder = job.output(JUDGE)
        if self.model is not None:
            save_scalar(job, self.model, tokenizer, folder, self.adapters)
        if not job.is_main:
            return ""
        folder.mkdir(parents=True, exist_ok=True)
        # the gold score is decided by its source alone
        files = sorted(folder.glob("*.safetensors")) if self.model else [Path(sandbox.__file__), Path(sandbox.facts.__file__)]
        fingerprint = self.identity or hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
        (folder / "judge.json").write_text(json.dumps({"name": self.name, "fingerprint": fingerprint}) + "\n", encoding="utf-8")
        return fingerprint


def make_judge(job: Job, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """The gold score where there is one; a second reward model, trained here; or what tells right from wrong, where no pairs are read."""
    if job.params.data.has_gold:
        return Judge("gold score", gold_scores)
    if not job.params.trains_judge:
        entries = checking.checkers_of(job)
        name = ", ".join(f"reward '{entry.name}'" for entry in entries)
        return Judge(name, partial(checking.totals, job, entries), identity=checking.fingerprint(job))
    params = job.params.evaluate.judge
    pairs, _ = reward.read_pairs(job, tokenizer, "data/prepared/judge.jsonl", params.max_tokens)
    second = reward.new_scalar(job, tokenizer, "judge")
    adapters = lora.attach(second.model, params.lora, "models/base", "evaluate.judge.lora", job)
    reward.fit(job, second, pairs, params)
    name = f"second reward model, trained on {len(pairs)} held-out pairs"
    return Judge(name, lambda rows, answers: reward_scores(second, tokenizer, rows, answers, job), second, adapters)


def gold_scores(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[float]:
    return [sandbox.gold_score(row["gold"], text) for row, text in zip(rows, answers, strict=True)]


def reward_scores(
    model: ScalarModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], answers: Sequence[str], job: Job
) -> list[float]:
    """Raw scores of a reward model for the answers."""
    ids = [
        encode_dialogue(tokenizer, [*row["prompt"], {"role": "assistant", "content": text}])[0]
        for row, text in zip(rows, answers, strict=True)
    ]
    return reward.score(model, ids, layout(job).micro_batch_tokens)


# --------------------------------------------------------------------------------------------------------------- numbers


def measure_reward_model(
    job: Job, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[dict[str, Any]], answers: dict[str, list[str]], device: torch.device
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What stage reward's model knows of held-out pairs, the mean score that it gives each policy's answers and how much it rose from
    sft, with its 95% interval; and all its scores."""
    model = frozen_scalar(job, "models/reward", tokenizer, device)
    pairs, _ = reward.read_pairs(job, tokenizer, "data/prepared/heldout_pairs.jsonl", job.params.reward.max_tokens)
    pairs = pairs[: job.params.evaluate.pairs]
    scores = reward.score_pairs(model, pairs, layout(job).micro_batch_tokens)
    given = {name: reward_scores(model, tokenizer, prompts, answers[name], job) for name in answers}
    means = {name: statistics.fmean(values) for name, values in given.items()}
    rise = bootstrap(job, np.array(given[job.params.policy]) - np.array(given["sft"]))
    return {**of_pairs(job, np.subtract(*scores)), **means, "ci95": rise}, given


def measure_implicit_reward(job: Job, tokenizer: PreTrainedTokenizerBase, policies: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """What DPO's implicit reward knows of held-out pairs."""
    pairs, _ = dpo.read_pairs(job, tokenizer, "data/prepared/heldout_pairs.jsonl")
    pairs = pairs[: job.params.evaluate.pairs]
    tokens = layout(job).micro_batch_tokens
    return of_pairs(job, np.array(dpo.implicit_margins(policies["dpo"], policies["sft"], pairs, job.params.dpo, tokens)))


def of_pairs(job: Job, margins: np.ndarray) -> dict[str, Any]:
    """Accuracy with its 95% interval, and calibration, of a reward by which the chosen answers score so much higher (N,)."""
    right = margins > 0
    return {
        "accuracy": float(right.mean()),
        "accuracy_ci95": bootstrap(job, right),
        "calibration": measures.calibration(margins.tolist()),
        "n": len(margins),
    }


def gold_summary(job: Job, prompts: Sequence[dict[str, Any]], scores: dict[str, list[float]]) -> dict[str, Any]:
    """Mean gold score of both models, their difference with its 95% interval, and the means of each kind of task."""
    differences = np.array(scores[job.params.policy]) - np.array(scores["sft"])
    kinds = sorted({row["gold"]["kind"] for row in prompts})
    by_kind = {
        kind: {
            name: statistics.fmean(s for s, row in zip(scores[name], prompts, strict=True) if row["gold"]["kind"] == kind)
            for name in scores
        }
        for kind in kinds
    }
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    return {**means, "difference": float(differences.mean()), "ci95": bootstrap(job, differences), "by_kind": by_kind}


def win_rate(job: Job, scores: dict[str, list[float]], rollouts: dict[str, Rollouts]) -> dict[str, Any]:
    """Share of prompts on which the new policy's answer scores higher than sft's (a tie counts one half); and without length's part."""
    new, sft = np.array(scores[job.params.policy]), np.array(scores["sft"])
    wins = np.where(new == sft, 0.5, new > sft)
    lengths = {name: np.array([len(ids) for ids in rollouts[name].answers]) for name in rollouts}
    longer = lengths[job.params.policy] - lengths["sft"]
    controlled = measures.length_controlled(wins, longer, resampled(job, len(wins)))
    return {"value": float(wins.mean()), "ci95": bootstrap(job, wins), "length_controlled": controlled}


def bootstrap(job: Job, values: np.ndarray) -> list[float]:
    """95% percentile interval of the mean, prompts resampled with replacement (Efron 1979)."""
    return [float(bound) for bound in np.percentile(values[resampled(job, len(values))].mean(axis=1), [2.5, 97.5])]


def resampled(job: Job, count: int) -> np.ndarray:
    """Numbers of prompts, of so many, drawn with replacement: a row for each sample."""
    generator = np.random.default_rng(job.seed("bootstrap"))
    return generator.integers(count, size=(job.params.evaluate.bootstrap_samples, count))


@torch.no_grad()
def kl(job: Job, policies: dict[str, PreTrainedModel], rollouts: Rollouts) -> float:
    """Mean over the new policy's answers of log p(answer) − log p_sft(answer), in nats, at the sampling temperature."""
    total = 0.0
    rows = list(zip(rollouts.prompts, rollouts.answers, strict=True))
    for part in micro_batches(rows, lambda row: len(row[0]) + len(row[1]), layout(job).micro_batch_tokens):
        packed = pack([prompt + ids for prompt, ids in part], policies["sft"].device)
        answered = packed.predictions([[0] * len(prompt) + [1] * len(ids) for prompt, ids in part])
        log_probs = {
            name: token_log_probs(logits_at(model, packed, answered.places), answered.targets, job.params.evaluate.temperature)
            for name, model in policies.items()
        }
        total += (log_probs[job.params.policy] - log_probs["sft"]).sum().item()
    return total / len(rows)


def perplexities(job: Job, policies: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Perplexity of both models on held-out plain text; their ratio is the alignment tax."""
    limit = job.params.answering.longest
    texts = [row["text"] for row in read_lines(job.input("data/prepared/heldout_text.jsonl"))][: job.params.evaluate.texts]
    rows = [[*ids, tokenizer.eos_token_id][:limit] for ids in encode_passages(tokenizer, texts)]
    values = {name: perplexity(model, rows, layout(job).micro_batch_tokens) for name, model in policies.items()}
    return {**values, "ratio": values[job.params.policy] / values["sft"]}


# --------------------------------------------------------------------------------------------------------------- outputs


def heldout(job: Job, prompts: Sequence[dict[str, Any]]) -> str:
    """A hash of what is asked and how: scores of two models with the same one can be compared."""
    asked = [[row["prompt"], row["gold"]] for row in prompts]
    references = [[[row.get("reference"), row.get("columns")] for row in prompts], *found] if (found := checking.identity(job)) else []
    content = json.dumps([asked, job.params.evaluate.temperature, job.params.answering.max_answer_tokens, *references])
    return hashlib.sha256(content.encode()).hexdigest()


def course(job: Job, score_all: ScoreAll) -> list[dict[str, float | None]]:
    """How the judged score went with the KL in the course of training: the curve on which over-optimisation shows (arXiv 2210.10760)."""
    records = read_lines(job.input("data/rollouts.jsonl"))
    records = records[:: -(-len(records) // JUDGED_ROLLOUTS)]
    judged = score_all(records, [record["answer"] for record in records])
    steps: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        steps.setdefault(record["step"], []).append(i)

    def mean(rows: list[int], name: str) -> float | None:
        values = [records[i][name] for i in rows]
        return None if None in values else statistics.fmean(values)  # there is no KL where nothing kept the policy near to sft

    return [
        {"step": step, "kl": mean(rows, "kl"), "gold": statistics.fmean(judged[i] for i in rows), "reward_model": mean(rows, "score")}
        for step, rows in steps.items()
    ]


if __name__ == "__main__":
    run("evaluate", main)
