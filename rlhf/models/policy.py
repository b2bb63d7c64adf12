"""Language models: the tiny Llama that is built here, and loading and saving of any causal model as a Hugging Face folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rlhf.config.training import BuiltBase
from rlhf.errors import UserError, first_line
from rlhf.models.attention import attend_to_pieces
from rlhf.models.gpu import with_few_kernels
from rlhf.models.limits import limits
from rlhf.models.linear import by_onednn
from rlhf.models.norms import with_few_passes
from rlhf.models.packed import Packed
from rlhf.tensors import send

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# the one that every family has, until rlhf.models.attention puts its own in its place
ATTENTION = "eager"


def build_policy(params: BuiltBase, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama with grouped-query attention and random weights of std 1/√width, for a tokenizer.

    The usual 0.02 suits widths in the thousands: in a model of a few hundred it leaves every layer near zero, and the circuits that look
    facts up form late or, with some seeds, not at all (LOG.md).
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=params.hidden_size,
            intermediate_size=params.intermediate_size,
            num_hidden_layers=params.layers,
            num_attention_heads=params.heads,
            num_key_value_heads=params.kv_heads,
            max_position_embeddings=params.context_tokens,
            tie_word_embeddings=True,
            initializer_range=params.hidden_size**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    attend_to_pieces(model)
    by_onednn(model)
    with_few_passes(model)
    with_few_kernels(model)
    return model


@contextmanager
def silence() -> Iterator[None]:
    """Have transformers say nothing: what it would warn of is returned."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def load_policy(folder: Path, precision: str) -> PreTrainedModel:
    """A causal language model, dropout off.

    Raises:
        UserError: the folder is missing or holds no such model.
    """
    if (folder / "adapter_config.json").is_file():
        # transformers would look for the model beneath it elsewhere, and save the adapter alone
        raise UserError(f"{folder}: is an adapter, and no model by itself", remedy="give the folder of the model that it was merged into")
    return load(AutoModelForCausalLM, folder, precision, "a causal language model")


def load(form: Any, folder: Path, precision: str, purpose: str, new: frozenset[str] = frozenset(), **options: Any) -> PreTrainedModel:
    """A model in one of transformers' forms, dropout off.

    Args:
        form: an AutoModel class.
        purpose: what it is to be, for messages.
        new: weights that the folder need not have.
        options: of `from_pretrained`.

    Raises:
        UserError: the folder is missing, or holds no model of this form or not all of its weights.
    """
    try:
        with silence():  # it would report new weights as a fault; those that are one are named below
            model, report = form.from_pretrained(
                folder,
                dtype=DTYPES[precision],
                attn_implementation=ATTENTION,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are named below
                trust_remote_code=False,  # left open, somebody would be asked
                **options,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be {purpose} ({first_line(error)})", remedy="give a Hugging Face model folder") from None
    if other := sorted(name for name, *_ in report["mismatched_keys"]):
        what = f"{folder}: cannot be {purpose}: other shapes than its config.json says for {', '.join(other[:3])}"
        raise UserError(what, remedy="give the weights and the config.json of one model")
    if form is AutoModelForCausalLM and "score.weight" in report["unexpected_keys"]:
        raise UserError(f"{folder}: cannot be {purpose}: it is a reward model", remedy="give a folder with a language model")
    if lacking := sorted(set(report["missing_keys"]) - new):
        raise UserError(
            f"{folder}: cannot be {purpose}: no weights for {', '.join(lacking[:3])}", remedy="give a folder with a whole model"
        )
    attend_to_pieces(model)
    by_onednn(model)
    with_few_passes(model)
    with_few_kernels(model)
    disable_dropout(model)
    model.config.use_cache = False
    return model


def logits_at(model: Any, packed: Packed, places: Tensor) -> Tensor:
    """Logits (n, V) at n places of a packed row alone: the output layer, often the largest of all, computes no others.

    Args:
        model: a causal language model, or the engine that trains it.
    """
    return model(**packed.read_at(places), logits_to_keep=send(places, packed.device), use_cache=False).logits.squeeze(0)


def check_length(model: PreTrainedModel, tokens: int, key: str) -> None:
    """Check that a model computes rightly on sequences of so many tokens.

    Args:
        key: what in params.yaml sets the length.

    Raises:
        UserError: names the key and the model's limit.
    """
    for name, limit in limits(model.config).items():
        if tokens > limit:
            raise UserError(f"{key}: {tokens} tokens are more than the model's {name}, {limit}", remedy=f"lower it to {limit} at most")


def context_tokens(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence that a model takes."""
    return min(limits(model.config).values(), default=sys.maxsize)


def context_of(folder: Path) -> int:
    """The same of the model in a folder, whose weights are not read.

    Raises:
        UserError: the folder holds no model that transformers knows.
    """
    try:
        return min(limits(AutoConfig.from_pretrained(folder)).values(), default=sys.maxsize)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no model ({str(error).splitlines()[0]})", remedy="give a Hugging Face model folder") from None


def disable_dropout(model: torch.nn.Module) -> None:
    """Every log-probability of a run must be a function of weights and tokens alone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention_dropout, resid_pdrop, layerdrop, …, and the noise that routers of experts add
            if isinstance(value, float) and ("drop" in name or name in ("jitter_noise", "input_jitter_noise")):
                setattr(module, name, 0.0)
