"""Layers written as Llama's are, with one kernel each for norm, rotary embedding and gate on a GPU (rlhf/kernels/layers.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, cast

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama

from rlhf.kernels import kernels

ROTARY = "apply_rotary_pos_emb"  # what the modules of transformers call it


def with_few_kernels(model: nn.Module) -> None:
    """Have a model's gates and rotary embeddings compute so on a GPU: those that are written as Llama's are. Others stay as they are."""
    for module in model.modules():
        kind: Any = type(module)
        if alike(getattr(kind, "forward", None), llama.LlamaMLP.forward) and type(cast(Any, module).act_fn) is type(ACT2FN["silu"]):
            module.__class__ = _gated(kind)
        elif alike(_rotary_of(kind), llama.apply_rotary_pos_emb):
            module.__class__ = _turning(kind)


def alike(one: Any, other: Any) -> bool:
    """Whether two functions are written alike, but for their names and docstrings."""
    codes = [getattr(function, "__code__", None) for function in (one, other)]
    return None not in codes and len({(code.co_code, code.co_names, code.co_consts[1:]) for code in cast(list[Any], codes)}) == 1


@cache
def _gated(kind: Any) -> type:
    """A class of multilayer perceptron, with its gate in one kernel."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.device.type == "cpu" or (found := kernels("layers")) is None:
            return cast(Tensor, kind.forward(self, x))
        return cast(Tensor, self.down_proj(found.Gate.apply(self.gate_proj(x), self.up_proj(x))))

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


@cache
def _turning(kind: Any) -> type:
    """A class of attention, whose forward pass is what it was but for the function that turns queries and keys."""
    known = kind.forward

    def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        if query.device.type == "cpu" or others or (found := kernels("layers")) is None:
            return cast(tuple[Tensor, Tensor], known.__globals__[ROTARY](query, key, cos, sin, **others))
        return cast(tuple[Tensor, Tensor], found.Rotation.apply(query, key, cos, sin))

    given = known.__globals__ | {ROTARY: turn}
    forward = FunctionType(known.__code__, given, known.__name__, known.__defaults__, known.__closure__)
    forward.__kwdefaults__, forward.__annotations__ = known.__kwdefaults__, known.__annotations__
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


def _rotary_of(kind: Any) -> Callable[..., Any] | None:
    """The function that a class of attention turns queries and keys by, if its forward pass calls one under this name."""
    known = getattr(kind, "forward", None)
    return known.__globals__.get(ROTARY) if isinstance(known, FunctionType) and ROTARY in known.__code__.co_names else None
