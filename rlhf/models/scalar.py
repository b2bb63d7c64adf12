"""Models with one number per token: the reward model (read at an answer's last token) and the critic (read at every token)."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.job import Job
from rlhf.models import saving
from rlhf.models.lora import Adapters
from rlhf.models.packed import Packed
from rlhf.models.policy import load
from rlhf.tensors import send

HEAD = frozenset({"score.weight"})
# a chat template whose dialogues end with the end token, in words that Jinja's other readers know (llama.cpp's, transformers.js's); what
# stands between two ends and is blank, as behind Phi 3's, is left out with the second; "{{" and "}}" are one brace each
ENDING = """{{% set written %}}{template}{{% endset %}}\
{{% if add_generation_prompt or eos_token not in written %}}{{{{ written }}}}{{% else %}}\
{{% for part in written.split(eos_token)[:-1] if part | trim %}}{{{{ part + eos_token }}}}{{% endfor %}}{{% endif %}}"""


class Head(nn.Linear):
    """Gives fp32 whatever its weights are: rewards of a mean of 8 would be a multiple of 1/16 in bf16, and many answers' the same."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


class ScalarModel(nn.Module):
    """A backbone with a linear head without bias, in Hugging Face's sequence-classification form, scored at every position.

    Its own ``forward`` would look for the last token by ``ids != pad``, which is wrong where pad is the end token: here positions come from
    lengths.

    Attributes:
        offset: what is taken from every value.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.model.score.__class__ = Head  # as it stands in the model, by whatever way that was made
        self.offset = 0.0

    def forward(self, **inputs: Any) -> Tensor:
        """Inputs of a Hugging Face model (B, T) → one value per token, flattened (B·T,), fp32."""
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return self.head(hidden).flatten() - self.offset

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """What transformers' models offer under this name, of the backbone."""
        self.model.gradient_checkpointing_enable(**options)

    @property
    def head(self) -> Head:
        return cast(Head, self.model.score)

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


def save_scalar(job: Job, scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, folder: Path, adapters: Adapters | None) -> None:
    """Have rank 0 write the model as `saving.save` does, so that other programs read its scores where they are read here.

    They take the last token of the dialogue that is no padding. So the template writes nothing behind the end token, and where that is what
    the model pads with, the folder gets another one.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = ENDING.format(template=str(tokenizer.chat_template).removesuffix("\n"))
    scalar.model.config.problem_type = "regression"  # else transformers' pipeline gives the sigmoid of a reward
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = padding_beside_end(tokenizer)
        scalar.model.config.pad_token_id = tokenizer.pad_token_id
    saving.save(job, scalar.model, tokenizer, folder, adapters)


def padding_beside_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that no dialogue has, to pad with; None where there is none: then transformers takes one dialogue at a time."""
    written = str(tokenizer.chat_template)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in (tokenizer.eos_token, tokenizer.bos_token) and token not in written]
    return min(free, key=lambda token: "pad" not in token, default=None)


def initialise_head(scalar: ScalarModel, seed: int) -> None:
    """Head ~ N(0, 1/√(d+1)) (arXiv 2009.01325, appendix B.1)."""
    weight = scalar.head.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        noise = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1)
        weight.copy_(noise)
