"""Models with one number per token: the reward model (read at an answer's last token) and the critic (read at every token)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.packed import Packed
from rlhf.models.policy import load
from rlhf.tensors import send

HEAD = frozenset({"score.weight"})


class ScalarModel(nn.Module):
    """A backbone with a linear head without bias, in Hugging Face's sequence-classification form, scored at every position.

    Its own ``forward`` would look for the last token by ``ids != pad``, which is wrong where pad is the end token: here positions come from
    lengths.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        """Inputs of a Hugging Face model (B, T) → one value per token, flattened (B·T,), fp32."""
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return self.head(hidden).flatten().float()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """What transformers' models offer under this name, of the backbone."""
        self.model.gradient_checkpointing_enable(**options)

    @property
    def head(self) -> nn.Linear:
        return cast(nn.Linear, self.model.score)

    @property
    def mean(self) -> float:
        """Mean score of held-out answers, stored with the reward model."""
        return self.model.config.reward_mean

    @property
    def std(self) -> float:
        return self.model.config.reward_std


def values_at(model: Any, packed: Packed, places: Tensor) -> Tensor:
    """Values (n,) at n places of a packed row alone.

    Args:
        model: a scalar model, or the engine that trains it.
    """
    return model(**packed.read_at(places))[send(places, packed.device)]


def load_scalar(folder: Path, tokenizer: PreTrainedTokenizerBase, precision: str) -> ScalarModel:
    """A reward model or critic from a folder; a causal model's folder gives its backbone, the head being new.

    Raises:
        UserError: the folder is missing or its architecture has no sequence-classification form.
    """
    given = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    return ScalarModel(load(AutoModelForSequenceClassification, folder, precision, "a reward model", HEAD, **given))


def initialise_head(scalar: ScalarModel, seed: int) -> None:
    """Head ~ N(0, 1/√(d+1)) (arXiv 2009.01325, appendix B.1)."""
    weight = scalar.head.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        noise = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1)
        weight.copy_(noise)
