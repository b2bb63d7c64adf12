"""Products with the weights while answers are written: on a CPU, the weights are laid out for products with few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.linear import Linear, multiply

Product = Callable[[Tensor], Tensor]


@contextmanager
def laid_out(model: PreTrainedModel) -> Iterator[None]:
    """Have a model's linear layers multiply with weights in oneDNN's blocked order inside the block; on a GPU nothing changes.

    A product of few rows takes about as long as it takes to bring its weights into the order that the processor multiplies in, which is
    done anew at each call: in fp32 that is half of the time at 4 rows and a seventh at 64, in bf16 half and an eighth (LOG.md). Here it is
    done once for a rollout. That takes the memory of the weights once more, in a phase that has neither gradients nor activations. Weights
    that are gathered layer by layer stay as they are.
    """
    layers = [
        module for module in model.modules() if isinstance(module, nn.Linear) and type(module) in (nn.Linear, Linear) and _fits(module)
    ]
    try:
        for layer in layers:
            vars(layer)["forward"] = _product(layer)  # of this one object, until the block ends
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _fits(layer: nn.Linear) -> bool:
    weight = layer.weight
    whole = weight.shape == (layer.out_features, layer.in_features)
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return whole and known and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _product(layer: nn.Linear) -> Product:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    bias = None if layer.bias is None else layer.bias.detach()
    return lambda rows: multiply(rows, weight, bias)
