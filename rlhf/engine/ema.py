"""A moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.engine.partition import is_partitioned


class Ema:
    """average ← decay·average + (1 − decay)·weights, in fp32: in half precision, small changes would be rounded away.

    Under ZeRO-3 each rank averages its own part of every parameter: `parts` ranks of them, this one being number `part`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: _local(p).detach().float().clone() for name, p in module.named_parameters()}
        self.part, self.parts = (dist.get_rank(), dist.get_world_size()) if is_partitioned(module) else (0, 1)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            self.average[name].lerp_(_local(parameter).float(), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the average in the place of the weights."""
        for name, parameter in module.named_parameters():
            _local(parameter).copy_(self.average[name])
            if hasattr(parameter, "ds_id"):
                cast(Any, parameter).partition()  # a copy that is whole on this rank still holds the old weights

    def restore(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Take up an average that was saved in this many parts; a single one is this rank's own."""
        for name, average in self.average.items():
            if len(parts) == 1 and parts[0][name].shape == average.shape:
                average.copy_(parts[0][name])
                continue
            flat = torch.cat([part[name].flatten() for part in parts])
            size = average.numel()
            # the last part is filled up with zeros to the size of the others
            mine = flat[self.part * size : (self.part + 1) * size]
            average.flatten()[: len(mine)].copy_(mine)


def _local(parameter: nn.Parameter) -> Tensor:
    return getattr(parameter, "ds_tensor", parameter.data)
