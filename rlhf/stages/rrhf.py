"""Stage rrhf: the sft policy learns to rank answers as the rewards do, and to give the best (arithmetic: rlhf/algorithms/rrhf.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.algorithms.rrhf import rrhf_loss
from rlhf.config.training import peak
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import add, own_micro_batches, start, sum_over_ranks
from rlhf.engine.order import Order
from rlhf.engine.partition import born
from rlhf.engine.setup import backward, settings, step, train_engine
from rlhf.engine.steps import Steps
from rlhf.job import Job, run
from rlhf.models import lora, saving
from rlhf.models.packed import pack
from rlhf.models.policy import load_policy, logits_at
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.rounds import Ranked, read_ranked
from rlhf.tensors import mask_from_lengths, token_log_probs


def main(job: Job) -> None:
    start(job)
    params = job.params.rrhf
    tokenizer = load_tokenizer(job.input("models/sft"))
    ranked, cut_off = read_ranked(job)
    with born(settings(job, "policy")):
        policy = load_policy(job.input("models/sft"), job.params.launch.precision)
    adapters = lora.attach(policy, params.lora, "models/sft", "rrhf.lora", job)
    history = fit(job, policy, ranked)
    saving.save(job, policy, tokenizer, job.output("models/rrhf"), adapters)
    if job.is_main:
        answers = sum(len(row.answers) for row in ranked)
        counts = {"steps": len(history), "prompts": len(ranked), "answers": answers, "cut_off": cut_off}
        learnt = {name: history[-1][name] for name in ("loss", "ranking_loss", "best_loss", "in_order")}
        job.write_metrics({**learnt, **counts, **lora.share(adapters)})
        job.write_plot("plots/rrhf.csv", history)


def fit(job: Job, policy: PreTrainedModel, ranked: Sequence[Ranked]) -> list[dict[str, float]]:
    """Train the policy in place; returns a row per step for the plot."""
    params = job.params.rrhf
    order = Order(len(ranked), params.batch_size, job.seed("order"))
    total = order.steps(params.epochs)
    engine = train_engine(policy, peak(params.optimizer, params.lora), job, "policy", total)
    state = checkpoints.load(job, {"model": engine})
    history: list[dict[str, float]] = state.get("history", [])
    steps = Steps(job, state["step"], total, params.checkpoint_every)
    for number in steps:
        started = time.perf_counter()
        batch = [ranked[i] for i in order.batch(number)]
        ranked_prompts = sum(row.is_ranked for row in batch)
        best_tokens = sum(len(row.answers[row.best]) for row in batch)
        sums: dict[str, Tensor] = {}
        parts = own_micro_batches(batch, lambda row: len(row.prompt) + sum(map(len, row.answers)), job, "rrhf.batch_size")
        for number_of_part, part in enumerate(parts, start=1):
            found = laid_out(engine, part)
            loss, stats = rrhf_loss(*found, params.length_exponent, params.ranking_weight, ranked_prompts, best_tokens)
            backward(engine, loss, last=number_of_part == len(parts))
            add(sums, {"loss": loss, **stats})
        means = {**sum_over_ranks(sums), "grad_norm": step(engine)}
        divergence.check(job, number + 1, means, {})
        history.append({"step": number + 1, **means})
        speed = {"learning_rate": engine.get_lr()[0], "prompts_per_second": len(batch) / (time.perf_counter() - started)}
        job.log(number + 1, total, {**means, **speed})
        if steps.checkpoint_due(number):
            checkpoints.save(job, number + 1, {"model": engine}, {"history": history}, -means["loss"])
    return history


def laid_out(model: Any, part: Sequence[Ranked]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, tokens and reward of each answer, whether there is one, and whether it ended, each (B, K); one forward pass."""
    answers = [(row.prompt, answer) for row in part for answer in row.answers]
    packed = pack([[*prompt, *answer] for prompt, answer in answers], model.device)
    wanted = packed.predictions([[0] * len(prompt) + [1] * len(answer) for prompt, answer in answers])
    log_probs = token_log_probs(logits_at(model, packed, wanted.places), wanted.targets)
    sums = torch.zeros(len(answers), device=model.device).index_add(0, wanted.rows, log_probs)
    there = mask_from_lengths(torch.tensor([len(row.answers) for row in part]), max(len(row.answers) for row in part)).to(model.device)
    cells = there.flatten().nonzero().squeeze(1)

    def filled(values: Tensor) -> Tensor:
        return values.new_zeros(there.numel()).index_copy(0, cells, values).view(there.shape)

    lengths = torch.tensor([float(len(answer)) for _, answer in answers], device=model.device)
    # which are equal is the same as where the batch's pairs are counted
    rewards = torch.tensor([reward for row in part for reward in row.rewards], dtype=torch.float64, device=model.device)
    ended = torch.tensor([float(ended) for row in part for ended in row.ended], device=model.device)
    return filled(sums), filled(lengths), filled(rewards), there, filled(ended)


if __name__ == "__main__":
    run("rrhf", main)
