"""Products with the weights while answers are written, which have few rows, so that it is the weights that take time.

On a CPU they are laid out for it. On a GPU layers that are given the same rows make one product: each alone has too little to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlhf.models.linear import Linear, cut, filled_up, multiply

Product = Callable[[Tensor], Tensor]
# what transformers calls layers that are given the same rows: of attention, and of a gated multilayer perceptron
ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@contextmanager
def laid_out(model: PreTrainedModel) -> Iterator[None]:
    """Have a model's linear layers multiply with weights in oneDNN's blocked order inside the block; on a GPU, some layers together.

    A product of few rows takes about as long as it takes to bring its weights into the order that the processor multiplies in, which is
    done anew at each call: in fp32 that is half of the time at 4 rows and a seventh at 64, in bf16 half and an eighth (LOG.md). Here it is
    done once for a rollout. That takes the memory of the weights once more, in a phase that has neither gradients nor activations. Weights
    that are gathered layer by layer stay as they are.
    """
    products = _blocked(model) if model.device.type == "cpu" else joined(model)
    try:
        for layer, product in products.items():
            vars(layer)["forward"] = product  # of this one object, until the block ends
        yield
    finally:
        for layer in products:
            vars(layer).pop("forward", None)


def _blocked(model: nn.Module) -> dict[nn.Linear, Product]:
    if not torch.backends.mkldnn.is_available():
        return {}
    # for bfloat16 oneDNN wants AVX-512 and refuses what has less, which torch multiplies by itself
    kinds = {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}
    known = [module for module in model.modules() if _is_whole(module)]
    return {layer: _product(layer) for layer in known if layer.weight.dtype in kinds}


def _is_whole(module: Any) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer and nothing else, with all of its weights."""
    return type(module) in (nn.Linear, Linear) and module.weight.shape == (module.out_features, module.in_features)


def _product(layer: nn.Linear) -> Product:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    bias = None if layer.bias is None else layer.bias.detach()

    def product(rows: Tensor) -> Tensor:
        """Rows (B, 1, in) of a decoding step as they are, of prompts (1, N, in) as in training: few numbers of them have few programs."""
        return multiply(rows, weight, bias) if rows.shape[-2] == 1 else cut(multiply(filled_up(rows), weight, bias), rows.shape)

    return product


def joined(model: nn.Module) -> dict[nn.Linear, Product]:
    """A product for each layer of those that are given the same rows: the first that is asked makes all of them."""
    products: dict[nn.Linear, Product] = {}
    for module in model.modules():
        for names in ALIKE:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(map(_is_whole, layers)) and len({layer.bias is None for layer in layers}) == 1:
                ordered = sorted(layers, key=lambda layer: layer.weight.data_ptr())
                joint = _Joint(ordered)
                products |= {layer: partial(joint.part, number) for number, layer in enumerate(ordered)}
    return products


class _Joint:
    """Several layers as one. What it makes is kept until each of them has asked for its part."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = side_by_side([layer.weight.detach() for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        self.widths = [layer.out_features for layer in layers]
        self.rows: Tensor | None = None
        self.parts: Sequence[Tensor] = ()
        self.left = 0

    def part(self, number: int, rows: Tensor) -> Tensor:
        """Rows (…, in) → (…, out) of one layer."""
        if rows is not self.rows:
            self.rows, self.parts, self.left = rows, linear(rows, self.weight, self.bias).split(self.widths, -1), len(self.widths)
        found, self.left = self.parts[number], self.left - 1
        if not self.left:
            self.rows, self.parts = None, ()
        return found


def side_by_side(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices (…, D) with their rows as one: in their own place where they lie one behind the other, as an optimiser often has them."""
    first = matrices[0]
    ends = [matrix.data_ptr() + matrix.nbytes for matrix in matrices]
    one_storage = len({matrix.untyped_storage().data_ptr() for matrix in matrices}) == 1
    if one_storage and all(matrix.is_contiguous() for matrix in matrices) and ends[:-1] == [other.data_ptr() for other in matrices[1:]]:
        return first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())
    return torch.cat(list(matrices))
