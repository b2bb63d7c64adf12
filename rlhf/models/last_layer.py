"""The last layer, of which little is read: only some tokens' outputs become logits or scores.

Nothing passes from one token to another after its attention. From there on its products are made for those tokens alone; the others' are 0,
and nothing reads them. Where answers are a quarter of the tokens, that spares about half of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.models.linear import Linear
from rlhf.models.options import ANOTHER


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model that writes text.

    Raises:
        UserError: it has none that are known as such.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise UserError(f"a model of type {model.config.model_type} has no list of its {depth} layers", remedy=ANOTHER)


class LastLayer:
    """Hooks of a model's last layer. rlhf/models/attention.py tells it when its attention is done, and what is read of the row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.read: Tensor | None = None  # (n,) places in the row of the tokens that are read, each once; None: all
        self.tokens = 0  # of the row
        layer = layers_of(model)[-1]
        layer.register_forward_pre_hook(self._begin)
        # each of a list of experts is given some of the tokens, in places of its own
        experts = {part for several in layer.modules() if isinstance(several, nn.ModuleList) for part in several.modules()}
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["last_layer"] = self
            if type(module) in (nn.Linear, Linear, Conv1D) and module not in experts:
                module.register_forward_pre_hook(self._pick)
                module.register_forward_hook(self._spread)

    def attended(self, read: Tensor | None, tokens: int) -> None:
        """Its attention is done, over a row of so many tokens.

        Raises:
            UserError: it attends again, to what was left out.
        """
        if self.read is not None:
            what = "a layer of this model attends twice, the second time to what was left out after the first"
            raise UserError(what, remedy=ANOTHER)
        self.read, self.tokens = read, tokens

    def _begin(self, *_: Any) -> None:
        self.read = None

    def _pick(self, _: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        return None if self.read is None else _Pick.apply(inputs[0], self.read)

    def _spread(self, _: nn.Module, __: tuple[Tensor], made: Tensor) -> Tensor | None:
        return None if self.read is None else _Spread.apply(made, self.read, self.tokens)


class _Pick(torch.autograd.Function):
    """Some rows of (…, T, D), each at most once: unlike index_select's, its gradient adds nothing up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.tokens = rows.shape[-2]
        return rows.index_select(-2, at)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        return _among(slopes[0], at, ctx.tokens), None


class _Spread(torch.autograd.Function):
    """Rows (…, n, D) at their places among zeros (…, T, D)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, at: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(at)
        return _among(rows, at, tokens)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        return slopes[0].index_select(-2, at), None, None


def _among(rows: Tensor, at: Tensor, tokens: int) -> Tensor:
    return rows.new_zeros(*rows.shape[:-2], tokens, rows.shape[-1]).index_copy_(-2, at, rows)
