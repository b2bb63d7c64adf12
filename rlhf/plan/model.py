"""The model that the stages start from: config, tokenizer, template and the heads of its files of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rlhf.config import Params
from rlhf.config.training import PretrainedBase
from rlhf.errors import UserError
from rlhf.models import given, headers
from rlhf.models.policy import context_of
from rlhf.models.tokenizer import given_tokenizer, load_tokenizer
from rlhf.plan.findings import Findings
from rlhf.plan.memory import Shape

EMBEDDING = re.compile(r"embed|\.wte$|\.wpe$")


@dataclass(frozen=True)
class Model:
    """What is known of a model; None where it could not be read."""

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    shape: Shape | None
    context: int | None = None
    layers: frozenset[str] = frozenset()  # names of its linear layers


def look_at(root: Path, params: Params, findings: Findings, *, is_pinned: bool) -> Model:
    """The model that params name, or the one that stage base has pinned."""
    pinned = "models/base"
    base = params.base
    if is_pinned or not isinstance(base, PretrainedBase):
        with findings.collecting():
            folder = root / pinned
            tokenizer, context, heads = load_tokenizer(folder), context_of(folder), headers.local(folder)
            shape = shape_of(AutoConfig.from_pretrained(folder), heads)
            findings.seen.append(("model", _described(pinned, shape, context)))
            return Model(pinned, tokenizer, shape, context, _layers(heads))
        return Model(pinned, None, None)
    return _given(root, base, findings)


def _given(root: Path, base: PretrainedBase, findings: Findings) -> Model:
    name = f"base.model '{base.model}'"
    if root != Path.cwd() and (root / base.model).is_dir():
        base = base.model_copy(update={"model": str(root / base.model)})
    if base.revision and Path(base.model).is_dir():
        findings.notes.append(f"base.revision: {base.revision} is not read, as {name} is a folder: set it to null")
    wrong = given.check(base)
    findings.problems += wrong
    tokenizer, shape, context, heads = None, None, None, {}
    try:
        folder = given.find(base)
        config = given.read_config(folder)
        heads = given.read_heads(folder, base)
        shape = shape_of(config, heads)
        context = context_of(folder)
        findings.seen.append(("model", _described(base.model, shape, context)))
        tokenizer, notes = given_tokenizer(folder, base.chat_template, trust_remote_code=base.trust_remote_code)
        findings.notes += [f"{name}: {note}" for note in notes]
    except UserError as error:
        findings.problems += [] if wrong else [error]  # else it is told of already
    return Model(name, tokenizer, shape, context, _layers(heads))


def _layers(heads: Mapping[str, torch.Tensor]) -> frozenset[str]:
    matrices = (name.removesuffix(".weight") for name, head in heads.items() if head.ndim == 2)
    return frozenset(name for name in matrices if not EMBEDDING.search(name))


def shape_of(config: PreTrainedConfig, heads: Mapping[str, torch.Tensor]) -> Shape:
    """Sizes of a model by its config and the heads of its weights. Families call them otherwise; what one has not is not counted."""
    text = config.get_text_config()
    width = getattr(text, "hidden_size", 0)
    attention = getattr(text, "num_attention_heads", None) or 1
    head = getattr(text, "head_dim", None) or width // attention
    linear = [head.shape for name, head in heads.items() if head.ndim == 2 and "embed" not in name and "lm_head" not in name]
    return Shape(
        weights=sum(prod(head.shape) for head in heads.values()),
        width=width,
        feed_forward=getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * width,
        layers=getattr(text, "num_hidden_layers", 0),
        vocabulary=getattr(text, "vocab_size", 0),
        key_values=2 * head * (getattr(text, "num_key_value_heads", None) or attention),
        linear=sum(map(sum, linear)),
    )


def _described(name: str, shape: Shape, context: int | None) -> str:
    return f"{name}: {shape.weights:,} weights in {shape.layers} layers" + (f", takes {context:,} tokens" if context else "")


def check_lengths(model: Model, lengths: Mapping[str, int], findings: Findings) -> None:
    """Hold the longest sequences that stages use against what the model takes.

    Args:
        lengths: tokens, by the keys of params.yaml.
    """
    for key, tokens in lengths.items():
        if model.context is not None and tokens > model.context:
            what = f"{key}: {tokens} tokens are more than the {model.context} that {model.name} takes"
            findings.problems.append(UserError(what, remedy=f"lower it to {model.context} at most"))
