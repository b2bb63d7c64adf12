"""Generation on the training weights: prompts as token ids in, answers as token ids out.

The answer to a prompt depends on its seed and not on its neighbours: each token takes one uniform number, drawn from the row's own
generator, and the inverse of the cumulative distribution. Rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.data.batches import pad_rows
from rlhf.tensors import mask_from_lengths


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest token."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Rollouts:
    """Answers sampled by one version of a policy."""

    prompts: list[list[int]]
    answers: list[list[int]]  # end token included where the answer ended by itself
    log_probs: list[list[float]]  # of each answer token, under the sampling temperature
    ended: list[bool]
    policy_version: int


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    policy_version: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> Rollouts:
    """Answer each prompt until its end token or `max_new_tokens`.

    Args:
        prompts: token ids, of different lengths; none empty.
        seeds: one per prompt; they alone decide the randomness of its answer.
        on_token: called with each new token of the first prompt (chat shows it at once).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    count = len(prompts)
    draws = [torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    uniforms = torch.stack(draws).to(device)
    answers: list[list[int]] = [[] for _ in range(count)]
    log_probs: list[list[float]] = [[] for _ in range(count)]

    # 1. prefill: prompts padded on the left, so that all answers start in the same column
    width = max(len(prompt) for prompt in prompts)
    step_ids = pad_rows([prompt[::-1] for prompt in prompts], pad_id, device).flip(1)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    attention = mask_from_lengths(torch.full_like(lengths, width), width, start=width - lengths).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    active = torch.arange(count, device=device)
    for step in range(sampling.max_new_tokens):
        inputs = {"input_ids": step_ids, "attention_mask": attention, "position_ids": positions, "past_key_values": cache}
        logits = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
        # 2. one token for each row that is still going
        tokens, chosen = sample(logits, uniforms[active, step], sampling)
        for row, token, log_prob in zip(active.tolist(), tokens.tolist(), chosen.tolist(), strict=True):
            answers[row].append(token)
            log_probs[row].append(log_prob)
            if row == 0 and on_token is not None:
                on_token(token)
        # 3. rows that ended leave the batch, cache included
        going = tokens != eos_id
        if not going.any():
            break
        positions = positions[:, -1:] + 1
        if not going.all():
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            active, tokens, attention, positions = active[keep], tokens[keep], attention[keep], positions[keep]
        attention = torch.cat([attention, attention.new_ones(len(active), 1)], dim=1)
        step_ids = tokens[:, None]
    model.train(was_training)
    ended = [answer[-1] == eos_id for answer in answers]
    return Rollouts([list(p) for p in prompts], answers, log_probs, ended, policy_version)


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverse-CDF sampling, and its log-probability. Logits (B, V), uniforms (B,) → (B,), (B,).

    The log-probability is that of the full distribution at the sampling temperature, as training computes it; top-k and top-p only
    narrow what is drawn.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    log_probs = (logits.float() / sampling.temperature).log_softmax(-1)
    probabilities, order = log_probs.exp().sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    cumulative = probabilities.double().cumsum(-1)
    picked = torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    tokens = order.gather(1, picked).squeeze(1)
    return tokens, log_probs.gather(1, tokens[:, None]).squeeze(1)
