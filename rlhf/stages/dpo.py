"""Stage dpo: direct preference optimisation of the sft policy on the preference pairs, instead of reward and ppo."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.algorithms.dpo import dpo_loss
from rlhf.config.training import Dpo, Preference, peak
from rlhf.engine import checkpoints, divergence
from rlhf.engine.distributed import add, equal_micro_batches, gather, micro_batches, own_micro_batches, start, sum_over_ranks
from rlhf.engine.order import Order
from rlhf.engine.partition import born
from rlhf.engine.setup import backward, settings, step, train_engine
from rlhf.engine.steps import Steps
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, run
from rlhf.models import lora, saving
from rlhf.models.dialogues import encode_dialogues
from rlhf.models.packed import pack
from rlhf.models.policy import check_length, load_policy, logits_at
from rlhf.models.tokenizer import load_tokenizer
from rlhf.tensors import token_log_probs

Side = tuple[list[int], list[int]]  # token ids of prompt and answer; mask, 1 on the answer's tokens
Pair = tuple[Side, Side]  # chosen, rejected


def main(job: Job) -> None:
    device = start(job)
    params = job.params.dpo
    tokenizer = load_tokenizer(job.input("models/sft"))
    pairs, too_long = read_pairs(job, tokenizer, "data/prepared/reward.jsonl")
    with born(settings(job, "policy")):
        policy = load_policy(job.input("models/sft"), job.params.launch.precision)
    check_length(policy, params.max_tokens, "dpo.max_tokens")
    adapters = lora.attach(policy, params.lora, "models/sft", "dpo.lora", job)
    reference = lora.reference(adapters, job, job.input("models/sft"), device) if params.reference == "live" else None
    history = fit(job, policy, reference, pairs, params, "dpo")
    saving.save(job, policy, tokenizer, job.output("models/dpo"), adapters)
    if job.is_main:
        counts = {"steps": len(history), "pairs": len(pairs), "too_long": too_long}
        job.write_metrics({**{name: history[-1][name] for name in ("loss", "accuracy", "margin")}, **counts, **lora.share(adapters)})
        job.write_plot("plots/dpo.csv", history)


def read_pairs(job: Job, tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[list[Pair], int]:
    """The pairs of a prepared file as token ids, and how many were left out as too long.

    Raises:
        UserError: no pair is left.
    """
    limit = job.params.dpo.max_tokens
    rows = read_lines(job.input(path))
    fitting = [pair for pair in encode_pairs(tokenizer, rows) if max(len(ids) for ids, _ in pair) <= limit]
    if not fitting:
        raise UserError(f"{path}: none of {len(rows)} pairs fits in {limit} tokens", remedy="raise dpo.max_tokens in params.yaml")
    return fitting, len(rows) - len(fitting)


def encode_pairs(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """Rows with prompt, chosen and rejected; earlier assistant turns of a prompt do not count, as both sides of a pair share them."""
    sides = encode_answers(tokenizer, ((row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")))
    return list(zip(sides[::2], sides[1::2], strict=True))


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Iterable[tuple[list[dict[str, Any]], str]]) -> list[Side]:
    """Prompts with their answers, of which the tokens of the answer alone count."""
    sides: list[Side] = []
    for ids, mask in encode_dialogues(tokenizer, ([*prompt, {"role": "assistant", "content": answer}] for prompt, answer in answers)):
        begin = len(mask) - mask[::-1].index(0)
        sides.append((ids, [0] * begin + [1] * (len(ids) - begin)))
    return sides


def fit(
    job: Job, policy: PreTrainedModel, reference: lora.Reference | None, pairs: Sequence[Pair], params: Preference, key: str
) -> list[dict[str, float]]:
    """Train the policy in place; returns a row per step for the plot.

    Args:
        key: where `params` stand in params.yaml.
    """
    order = Order(len(pairs), params.batch_size, job.seed("order"))
    total = order.steps(params.epochs)
    engine = train_engine(policy, peak(params.optimizer, params.lora), job, "policy", total)
    before = torch.tensor(reference_before_training(job, engine, pairs, params), device=engine.device)  # (pairs, 2)
    state = checkpoints.load(job, {"model": engine})
    history: list[dict[str, float]] = state.get("history", [])
    steps = Steps(job, state["step"], total, params.checkpoint_every)
    for number in steps:
        started = time.perf_counter()
        batch = order.batch(number)
        sums: dict[str, Tensor] = {}
        parts = own_micro_batches(batch, lambda row: tokens_of_pair(pairs[row]), job, f"{key}.batch_size")
        for number_of_part, rows in enumerate(parts, start=1):
            micro = [pairs[i] for i in rows]
            if reference is None:
                known = before[rows, 0], before[rows, 1]
            else:
                with reference() as model, torch.no_grad():
                    known = pair_log_probs(model, micro)
            loss, stats = dpo_loss(pair_log_probs(engine, micro), known, params.loss, params.beta, params.label_smoothing, len(batch))
            backward(engine, loss, last=number_of_part == len(parts))
            add(sums, {"loss": loss, **{name: value.double() / len(batch) for name, value in stats.items()}})
        means = {**sum_over_ranks(sums), "grad_norm": step(engine)}
        divergence.check(job, number + 1, means, {})
        history.append({"step": number + 1, **means})
        speed = {"learning_rate": engine.get_lr()[0], "pairs_per_second": len(batch) / (time.perf_counter() - started)}
        job.log(number + 1, total, {**means, **speed})
        if steps.checkpoint_due(number):
            checkpoints.save(job, number + 1, {"model": engine}, {"history": history}, -means["loss"])
    return history


def reference_before_training(job: Job, engine: Any, pairs: Sequence[Pair], params: Preference) -> list[tuple[float, float]]:
    """The reference's log-probabilities of all pairs, chosen and rejected, where they are not computed as they are needed.

    The policy itself gives them, before its first step: it is still sft's. The ranks share the pairs.
    """
    if not (isinstance(params, Dpo) and params.reference == "precomputed"):
        return [(0.0, 0.0)] * len(pairs)
    even = [*pairs, *pairs[: -len(pairs) % job.world_size]]  # as many on each rank
    mine = range(len(even))[job.rank :: job.world_size]
    found = dict[int, tuple[float, float]]()
    for rows in equal_micro_batches(mine, lambda row: tokens_of_pair(even[row]), job):
        found |= zip(rows, log_probs_of(engine, [even[row] for row in rows]), strict=True)
    return gather([found[row] for row in mine], job)[: len(pairs)]


def tokens_of_pair(pair: Pair) -> int:
    return sum(len(ids) for ids, _ in pair)


@torch.no_grad()
def log_probs_of(model: Any, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """Log-probabilities of the chosen and the rejected answer of each pair, for measuring; one forward pass."""
    training = model.training
    model.eval()
    chosen, rejected = pair_log_probs(model, pairs)
    model.train(training)
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def pair_log_probs(model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Σ log p(token) over the answer's tokens, chosen and rejected, each (B,); one forward pass for both."""
    sums = side_log_probs(model, [side for pair in pairs for side in pair])
    return sums[::2], sums[1::2]


def side_log_probs(model: Any, sides: Sequence[Side]) -> Tensor:
    """Σ log p(token) over each answer's tokens (B,); one forward pass."""
    packed = pack([ids for ids, _ in sides], model.device)
    wanted = packed.predictions([mask for _, mask in sides])
    log_probs = token_log_probs(logits_at(model, packed, wanted.places), wanted.targets)
    return torch.zeros(len(sides), device=model.device).index_add(0, wanted.rows, log_probs)


def implicit_margins(policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[Pair], params: Dpo, tokens: int) -> list[float]:
    """By how much the implicit reward of each pair's chosen answer is higher; so many tokens to a forward pass."""
    found = {}
    numbered = list(enumerate(pairs))
    for part in micro_batches(numbered, lambda one: tokens_of_pair(one[1]), tokens):
        those = [pair for _, pair in part]
        after = log_probs_of(policy, those)
        before = log_probs_of(reference, those) if params.reference != "none" else [(0.0, 0.0)] * len(part)
        for (number, _), (c, r), (known_c, known_r) in zip(part, after, before, strict=True):
            found[number] = params.beta * ((c - known_c) - (r - known_r))
    return [found[number] for number in range(len(pairs))]


if __name__ == "__main__":
    run("dpo", main)
