"""Whether a model can be trained here: told from its configuration, before any weight is read."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging

from rlhf.errors import UserError
from rlhf.models.attention import attend, attend_to_pieces
from rlhf.models.last_layer import layers_of
from rlhf.models.limits import ropes
from rlhf.models.pieces import Piece
from rlhf.models.policy import ATTENTION, disable_dropout

TRIED = "tried"  # name under which a model on trial finds its attention
# rotary positions that are functions of the configuration alone, or are within rlhf/models/limits.py
BY_LENGTH = frozenset({"dynamic", "longrope"})  # they look at the positions, of which there are none without weights
ROPES = BY_LENGTH | {"default", "linear", "yarn", "llama3", "proportional"}
BETWEEN_TOKENS = "passes on from token to token otherwise than by attention, in a packed row from one sequence to the next"


def unsupported(config: Any) -> str | None:
    """Why a model of this configuration cannot be trained here; None where nothing is found.

    A model without weights is called with a packed row, which shows what its layers ask of their attention.
    """
    text, kind = config.get_text_config(), f"a model of type {config.model_type}"
    if others := {str(rope.get("rope_type")) for rope in ropes(text)} - ROPES:
        return f"{kind} has positions that are not known here: rope_type {', '.join(sorted(others))}"
    if text.model_type == "llama4_text" and text.attn_temperature_tuning:
        return f"{kind} scales queries by their place in the row (attn_temperature_tuning), which is another one in a packed row"
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would say of a model without weights
    try:
        return _on_trial(config, kind)
    finally:
        logging.set_verbosity(before)


def _on_trial(config: Any, kind: str) -> str | None:
    try:
        model = _without_weights(config)
    except Exception:  # whatever is wrong with it, loading the model says it better
        return None
    try:
        attend_to_pieces(model)
        found = _between_tokens(model) or (_at_random(model) and "draws at random while it trains, beside dropout, which is off")
        return f"{kind} {found}" if found else None
    except UserError as error:
        return error.what
    except NotImplementedError:  # an operation that cannot be tried without weights
        return None
    except Exception as error:
        said = (str(error) or repr(error)).splitlines()[0]
        return None if "meta" in said else f"{kind} cannot take packed rows ({said})"


def _without_weights(config: Any) -> Any:
    config = copy.deepcopy(config)
    for rope in ropes(config.get_text_config()):
        if rope["rope_type"] in BY_LENGTH:
            rope["rope_type"] = "default"
    form: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = form.from_config(config, attn_implementation=ATTENTION, dtype=torch.bfloat16)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")  # the one that does not look at what the tokens are
    disable_dropout(model)
    return model


def _between_tokens(model: Any) -> str | None:
    calls: list[nn.Module] = []
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "counts positions by itself, in a packed row on from one sequence to the next"
    _call(model.eval(), calls.append)
    layers = layers_of(model)
    if len(calls) < len(layers):
        return f"{BETWEEN_TOKENS}: {len(calls)} of its {len(layers)} layers attend"
    if any(isinstance(part, nn.Conv1d) for part in layers.modules()):
        return f"{BETWEEN_TOKENS}: its layers have convolutions"
    return None


def _at_random(model: Any) -> bool:
    with (watch := _Watch()):
        _call(model.train(), lambda _: None)
    return watch.random


def _call(model: Any, attending: Callable[[nn.Module], None]) -> None:
    """A forward pass over a packed row, of which one token is read."""

    def tried(module: nn.Module, *states: Any, **options: Any) -> tuple[Tensor, None]:
        attending(module)
        return attend(module, *states, **options)

    AttentionInterface.register(TRIED, tried)
    model.config._attn_implementation = TRIED
    with torch.device("meta"), torch.no_grad():
        row, mask, read = torch.zeros(1, 5, dtype=torch.long), torch.empty(1, 1, 0, 0), torch.zeros(1, dtype=torch.long)
        model(input_ids=row, position_ids=row, attention_mask=mask, pieces=[Piece(2, None), Piece(3, 0)], read=read, use_cache=False)


class _Watch(TorchDispatchMode):
    """Whether random numbers are drawn."""

    random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random = self.random or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
