"""Activations whose bits do not hang on how many rows are computed at once.

torch computes them on a CPU by vectors, and the rest of a tensor that fills none, or of a thread's part of it, otherwise. So no call takes
more rows than one thread computes where there are several, and none has such a rest in which another row's would begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

VECTORS = 32  # numbers that a loop of torch's takes at a time
PART = 2**15  # numbers, from which on a second thread helps
HOMES = ("torch.nn.modules.activation", "transformers.activations")


@contextmanager
def by_rows(model: PreTrainedModel) -> Iterator[None]:
    """Have a model's activations computed so inside the block; on a GPU nothing changes."""
    found = [module for module in model.modules() if type(module).__module__ in HOMES and model.device.type == "cpu"]
    try:
        for module in found:
            vars(module)["forward"] = _in_parts(module.forward)  # of this one object, until the block ends
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)


def _in_parts(activate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(states: Tensor) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        width = rows.shape[1]
        most = max(1, PART // width) if width % VECTORS == 0 else 1
        if len(rows) <= most or (most > 1 and torch.get_num_threads() == 1):
            return activate(rows).view(states.shape)
        return torch.cat([activate(part) for part in rows.split(most)]).view(states.shape)

    return forward
