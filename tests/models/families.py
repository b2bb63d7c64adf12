"""Tiny models of each family, and what transformers' eager attention makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from rlhf.models.attention import attend_to_pieces
from rlhf.models.gpu import with_few_kernels
from rlhf.models.norms import with_few_passes
from rlhf.models.packed import Packed, pad_rows
from rlhf.models.policy import disable_dropout
from rlhf.rollout.generate import Rollouts
from rlhf.tensors import mask_from_lengths

VOCABULARY = 400
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**TINY, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": TINY,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 4},
    "phi3": GROUPED,
    "gpt_oss": {**GROUPED, **EXPERTS, "head_dim": 8},
    "mixtral": {**GROUPED, **EXPERTS, "router_jitter_noise": 0.1, "output_router_logits": True},
    "qwen2_moe": {**GROUPED, **EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "tie_word_embeddings": True},
    "qwen3_moe": {**GROUPED, **EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
}
WINDOWED = {
    **{family: {} for family in ("mistral", "gemma2", "phi3", "gpt_oss", "mixtral")},
    **{family: {"use_sliding_window": True, "max_window_layers": 1} for family in ("qwen2", "qwen2_moe", "qwen3_moe")},
}
LENGTHS = (7, 30, 1, 12, 45, 25)
PAD, EOS = 0, 1  # of the project's tokenizer
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}


def tiny(family: str, *, scores: float = 8, **changes: Any) -> PreTrainedModel:
    """A random model whose logits differ clearly from token to token.

    Args:
        scores: by how much what queries and keys are made by is enlarged: by so much that Gemma's soft cap of 50 tells.
        changes: of its configuration.
    """
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{"vocab_size": VOCABULARY, **FAMILIES[family], **SPECIAL, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    attend_to_pieces(model)
    with_few_passes(model)
    with_few_kernels(model)
    disable_dropout(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            factor = 4.0 if parameter.ndim > 1 else 1.0
            if re.search(r"[qk]_(proj|norm)\.weight|sinks", name):
                factor *= scores if parameter.ndim > 1 else scores**0.5
            parameter.mul_(factor)
    return model


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[Any]:
    """The model as transformers computes it where no kernel stands between."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    yield model
    model.config._attn_implementation = before


def sequences(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def padded_left(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """A batch as DeepSpeed-Chat and TRL make it: prompts end in the same column, positions count from the first real token."""
    width = max(map(len, rows))
    mask = mask_from_lengths(torch.full((len(rows),), width), width, start=torch.tensor([width - len(row) for row in rows])).long()
    ids = pad_rows([row[::-1] for row in rows], pad_id).flip(1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def of_each(packed: Packed, values: Tensor) -> list[Tensor]:
    """The values of each sequence, out of what was computed for the packed row."""
    return [values[places[:length]] for places, length in zip(packed.places, packed.lengths.tolist(), strict=True)]


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def near_eager(model: PreTrainedModel, found: Rollouts, temperature: float = 1.0) -> None:
    """Log-probabilities of answers are those of whole sequences in transformers' eager attention."""
    with eager(model):
        for prompt, answer, log_probs in zip(found.prompts, found.answers, found.log_probs, strict=True):
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1)[torch.arange(len(answer)), answer]
            torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=0, atol=1e-4)
