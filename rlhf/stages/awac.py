"""Stage awac: a warm start of the sft policy from answers that earlier versions left behind, before it answers anything itself.

Rewards are those of section rewards as it is now, asked once before training; what older models said of the answers is not read. The
arithmetic stands in rlhf/algorithms/awac.py. The KL of the stage that follows is still taken to sft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.algorithms.awac import advantages, awac_loss, effective_sample_size, weights
from rlhf.config.training import peak
from rlhf.data import earlier
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import add, equal_micro_batches, gather, own_micro_batches, start, sum_over_ranks
from rlhf.engine.order import Order
from rlhf.engine.partition import born
from rlhf.engine.setup import backward, settings, step, train_engine
from rlhf.engine.steps import Steps
from rlhf.job import Job, read_lines, run
from rlhf.models import lora, saving
from rlhf.models.policy import check_length, load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rewards.scoring import Outcome
from rlhf.rollout.experience import Layout
from rlhf.stages.answering import load_reward, model_scores
from rlhf.stages.dpo import Side, encode_answers, side_log_probs
from rlhf.stages.rewarding import Rewards

NOT_TRAINED_ON = ("heldout_pairs", "heldout_prompts", "judge")


@dataclass(frozen=True)
class Answer:
    """A stored answer: its line, its tokens with its prompt's, and the number of its prompt."""

    line: earlier.Line
    side: Side
    prompt: int

    @property
    def tokens(self) -> int:
        """Those that the loss counts."""
        return sum(self.side[1])


def main(job: Job) -> None:
    device = start(job)
    params = job.params.awac
    tokenizer = load_tokenizer(job.input("models/sft"))
    answers, left_out = read_answers(job, tokenizer)
    job.say(f"{len(answers)} answers to learn from; left out: {earlier.counted(left_out)}")
    rewards = torch.tensor(score(job, tokenizer, answers, device), dtype=torch.float64)
    better = advantages(rewards, torch.tensor([answer.prompt for answer in answers]))
    with born(settings(job, "policy")):
        policy = load_policy(job.input("models/sft"), job.params.launch.precision)
    check_length(policy, params.max_tokens, "awac.max_tokens")
    adapters = lora.attach(policy, params.lora, "models/sft", "awac.lora", job)
    history = fit(job, policy, answers, better)
    saving.save(job, policy, tokenizer, job.output("models/awac"), adapters)
    if job.is_main:
        counts = {"steps": len(history), "answers": len(answers), "prompts": len({answer.prompt for answer in answers}), **left_out}
        spread = {"reward": rewards.mean().item(), "advantage_std": better.std(correction=0).item()}
        means = {name: sum(row[name] for row in history) / len(history) for name in ("loss", "effective_sample_size")}
        job.write_metrics({**means, **spread, **counts, **lora.share(adapters)})
        job.write_plot("plots/awac.csv", history)


def read_answers(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Answer], dict[str, int]]:
    """The answers as token ids, and how many were left out, by reason.

    Raises:
        UserError: no prompt has two that may be learnt from.
    """
    lines = earlier.read(job.input(str(earlier.FOLDER)))
    held_out = [row for name in NOT_TRAINED_ON for row in read_lines(job.input(f"data/prepared/{name}.jsonl"))]
    sides = encode_answers(tokenizer, ((line["prompt"], line["answer"]) for line in lines))
    numbers, left_out = earlier.usable(lines, held_out, lambda number: len(sides[number][0]) <= job.params.awac.max_tokens)
    prompts: dict[bytes, int] = {}
    answers = [Answer(lines[i], sides[i], prompts.setdefault(earlier.prompt_of(lines[i]), len(prompts))) for i in numbers]
    return answers, left_out


def score(job: Job, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer], device: torch.device) -> list[float]:
    """What section rewards gives each answer; the ranks share the work.

    Raises:
        UserError: a reward function or service failed on too many answers.
    """
    rewards = Rewards.of(job)
    mine = [answers[row % len(answers)] for row in range(job.rank, len(answers) + -len(answers) % job.world_size, job.world_size)]
    asked = rewards.begin([answer.line for answer in mine], [answer.line["answer"] for answer in mine])
    said = of_model(job, tokenizer, mine, device) if job.params.trains_reward else {}
    given = rewards.collect(asked)
    found: list[tuple[float, dict[str, Outcome]]] = []
    for row in range(len(mine)):
        found.append(rewards.summed({name: outcomes[row] for name, outcomes in given.items()}, said.get(row, [])))
    rewards.checkers.close()
    all_of_them = gather(found, job)[: len(answers)]
    rewards.check(job, 0, [outcomes for _, outcomes in all_of_them])
    return [total for total, _ in all_of_them]


@torch.no_grad()
def of_model(job: Job, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer], device: torch.device) -> dict[int, list[float]]:
    """The reward model's score of each of this rank's answers, by its number."""
    model = load_reward(job, tokenizer, device)
    found: dict[int, list[float]] = {}
    for part in equal_micro_batches(range(len(answers)), lambda row: len(answers[row].side[0]), job):
        sides = [answers[row].side for row in part]
        at = Layout.of([ids for ids, _ in sides], [mask.index(1) for _, mask in sides], max(sum(mask) for _, mask in sides), device)
        found |= {row: [score] for row, score in zip(part, model_scores(model, at).tolist(), strict=True)}
    return found


def fit(job: Job, policy: PreTrainedModel, answers: Sequence[Answer], better: Tensor) -> list[dict[str, float]]:
    """Train the policy in place; returns a row per step for the plot.

    Args:
        better: advantage of each answer.
    """
    params = job.params.awac
    order = Order(len(answers), params.batch_size, job.seed("order"))
    total = order.steps(params.epochs)
    engine = train_engine(policy, peak(params.optimizer, params.lora), job, "policy", total)
    state = checkpoints.load(job, {"model": engine})
    history: list[dict[str, float]] = state.get("history", [])
    steps = Steps(job, state["step"], total, params.checkpoint_every)
    for number in steps:
        started = time.perf_counter()
        rows = order.batch(number)
        batch = [answers[row] for row in rows]
        stats = learn(job, engine, batch, weights(better[rows], params.advantage_temperature, params.max_weight))
        divergence.check(job, number + 1, stats, {})
        history.append({"step": number + 1, **stats})
        seconds = time.perf_counter() - started
        speed = {"learning_rate": engine.get_lr()[0], "tokens_per_second": sum(len(answer.side[0]) for answer in batch) / seconds}
        job.log(number + 1, total, {**stats, **speed})
        if steps.checkpoint_due(number):
            checkpoints.save(job, number + 1, {"model": engine}, {"history": history}, -stats["loss"])
    return history


def learn(job: Job, engine: DeepSpeedEngine, batch: Sequence[Answer], counted: Tensor) -> dict[str, float]:
    """A step on a global batch, which every rank sees whole, as it does the weights (B,) of its answers."""
    tokens = sum(answer.tokens for answer in batch)
    parts = own_micro_batches(range(len(batch)), lambda place: len(batch[place].side[0]), job, "awac.batch_size")
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts, start=1):
        log_probs = side_log_probs(engine, [batch[place].side for place in part])
        loss = awac_loss(log_probs, counted[part].to(engine.device), tokens)
        backward(engine, loss, last=number == len(parts))
        add(sums, {"loss": loss})
    stats = {**sum_over_ranks(sums), "grad_norm": step(engine)}
    return stats | {"effective_sample_size": effective_sample_size(counted), "largest_weight": counted.max().item()}


if __name__ == "__main__":
    run("awac", main)
