"""The training weights, held so that answers can be sampled with them: gathered where ranks share them out, adapters folded in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from transformers import PreTrainedModel

from rlhf.engine.partition import any_rank, generating, is_partitioned
from rlhf.rollout.generate import Together


@contextmanager
def policy_weights(model: PreTrainedModel, gather: Literal["whole", "layers"]) -> Iterator[Together]:
    """Have a model ready to sample inside the block, one in training or a frozen one; gives what `generate` asks before each step.

    Args:
        gather: what ranks that share the parameters out (ZeRO-3) do: whole, each gathers all of them once; layers, one layer at a time in
            each forward pass, which all ranks must then make together.
    """
    if gather == "layers" and is_partitioned(model):
        yield any_rank
        return
    with ExitStack() as afterwards:
        afterwards.enter_context(generating(model))
        # In half precision they stay beside the weights. A weight and its change add up to the nearest number of 8 or 11 bits, so that
        # most of a small change is lost, and it would not be the policy in training that samples.
        if model.dtype == torch.float32:
            afterwards.enter_context(folded(model))
        yield bool


@contextmanager
@torch.no_grad()
def folded(model: torch.nn.Module) -> Iterator[None]:
    """Add the adapters (LoRA) to the weights inside the block, which spares two matrix products beside each weight's own.

    The base weights are set aside and put back, not computed back: not a bit of them changes. This takes the memory of the adapted weights
    once more, in a phase that has neither gradients nor activations.
    """
    library = sys.modules.get("peft.tuners.lora")  # which is loaded where there are adapters
    layers = [module for module in model.modules() if library and isinstance(module, library.LoraLayer)]
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()
