"""A moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """average ← decay·average + (1 − decay)·weights, in fp32: in half precision, small changes would be rounded away.

    Under ZeRO-3 each rank averages its own part of every parameter.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: _local(p).detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            self.average[name].lerp_(_local(parameter).float(), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the average in the place of the weights."""
        for name, parameter in module.named_parameters():
            _local(parameter).copy_(self.average[name])


def _local(parameter: nn.Parameter) -> Tensor:
    return getattr(parameter, "ds_tensor", parameter.data)
