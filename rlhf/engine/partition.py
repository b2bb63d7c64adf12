"""Models whose parameters are shared out among the ranks (ZeRO-3): born so, held whole for a while, saved whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import DeepSpeedTensorOverride, GatheredParameters
from deepspeed.runtime.zero.partition_parameters import DEFAULT_TENSOR_OVERRIDES
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config


def is_partitioned(module: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def born(settings: dict[str, Any]) -> Iterator[None]:
    """Have transformers load models in parts, if these DeepSpeed settings say ZeRO-3: no rank ever holds a whole one."""
    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    announced = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it
    # transformers gives the weights their type; DeepSpeed would round what must stay in fp32, too: the frequencies of rotary embeddings
    DEFAULT_TENSOR_OVERRIDES.remove(DeepSpeedTensorOverride.dtype)
    try:
        yield
    finally:
        DEFAULT_TENSOR_OVERRIDES.append(DeepSpeedTensorOverride.dtype)
        unset_hf_deepspeed_config()
        del announced


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather all parameters on each rank until the block ends; to read them, not for forward passes."""
    with GatheredParameters(list(module.parameters())):
        yield


def own(module: nn.Module, engine: DeepSpeedEngine) -> None:
    """Have a module keep the engine that looks after it: what gathers its parameters goes with the engine."""
    # as an attribute of torch's kind it would be a child of its own child
    object.__setattr__(module, "engine", engine)


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Hold an engine's model whole for all forward passes in the block, of which each rank may need another number."""
    if not is_partitioned(model):
        yield
        return
    optimizer: Any = model.engine.optimizer  # type: ignore[union-attr]  # `own` put it there
    hooks = getattr(optimizer, "parameter_offload", optimizer)  # an engine that does not train has them in its optimiser's place
    with whole(model):
        # they would let go of each layer after its pass, and compare the order of passes with the other ranks
        hooks._remove_module_hooks()
        hooks.forward_hooks, hooks.backward_hooks = [], []
        try:
            yield
        finally:
            hooks.setup_zero_stage3_hooks()


def any_rank(going: bool) -> bool:
    """Whether any rank goes on. All ranks must ask."""
    flag = torch.tensor([going], dtype=torch.int32, device=get_accelerator().current_device_name())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


@contextmanager
def written(parameter: Tensor) -> Iterator[None]:
    """Have a parameter whole inside the block, and keep what is written to it. Every rank must write the same."""
    with GatheredParameters([parameter], modifier_rank=0):
        yield


def whole_weights(module: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with whole tensors on the CPU, on rank 0; None where the module itself is whole. All ranks must call it."""
    if not is_partitioned(module):
        return None
    copies = {}
    for parameter in module.parameters():
        with GatheredParameters([parameter]):
            if torch.distributed.get_rank() == 0:
                copies[id(parameter)] = parameter.detach().cpu().clone()
    # tied weights have several names, and one tensor
    return {name: copies[id(p)] for name, p in module.named_parameters(remove_duplicate=False) if id(p) in copies}
