"""What a layer asks of its attention beside queries, keys and values: which of it is understood, and attention that heeds it.

transformers hands it over by name. What a name stands for is applied, or the model is refused: were it passed over, another model would be
trained, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError

ANOTHER = "choose a model of another family (docs/own-model.md)"
APPLIED = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})
# of the model's call as a whole, not of attention; and what is looked at by its value
NOT_OF_ATTENTION = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
)
BY_VALUE = frozenset({"dropout", "is_causal"})
KNOWN = APPLIED | NOT_OF_ATTENTION | BY_VALUE


@dataclass(frozen=True)
class Options:
    """Of the attention of one layer."""

    scale: float | None  # of the products of queries and keys; None: 1/√width
    window: int | None  # the last so many tokens are seen, the query's own among them; None: all before it
    softcap: float | None  # scores go through softcap · tanh(score / softcap)
    sinks: Tensor | None  # (Q,) a score of each head that takes its share of the softmax and brings no value

    @property
    def plain(self) -> bool:
        """Whether torch's own kernels compute it."""
        return self.softcap is None and self.sinks is None

    def narrower(self, keys: int) -> int | None:
        """The window, where so many keys do not fit into it."""
        return self.window if self.window is not None and self.window < keys else None


def options_of(module: nn.Module, given: Mapping[str, Any]) -> Options:
    """What a layer of attention asks for.

    Raises:
        UserError: something that is not applied here.
    """
    unread = [name for name, value in given.items() if name not in KNOWN and value is not None and value is not False]
    if given.get("dropout"):
        unread.append("dropout")
    if given.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unread.append("tokens after a query (is_causal=False)")
    if unread:
        kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
        raise UserError(f"a model of type {kind} asks of its attention what is not applied here: {', '.join(unread)}", remedy=ANOTHER)
    return Options(given.get("scaling"), _window(module, given), given.get("softcap"), given.get("s_aux"))


def _window(module: Any, given: Mapping[str, Any]) -> int | None:
    if "sliding_window" in given:
        return given["sliding_window"]
    # some models have it in the mask alone, which a packed row goes without
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    return config.sliding_window if kinds and kinds[module.layer_idx] == "sliding_attention" else None


def seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys): which keys each query sees, the last query being the last key's."""
    before = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return before if window is None else before.triu(keys - queries - window + 1)


def weigh(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: Options) -> Tensor:
    """Attention with all options, step by step: query (B, Q, N, D), key and value (B, H, M, D), a mask for (B, Q, N, M) → (B, Q, N, D).

    Each group of Q / H heads of queries shares keys and values.

    Args:
        mask: true where a key is seen, or a number to add.
    """
    shared = (*key.shape[:2], -1)  # heads that share keys stand where the tokens of a sequence would
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    scores = (query.reshape(*shared, query.shape[-1]) @ key.mT).view(*query.shape[:3], key.shape[2]) * scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    # the least number, not -∞: a row of padding sees nothing, and is to be finite
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if options.sinks is not None:
        column = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    return (weights.reshape(*shared, key.shape[2]) @ value).view(*query.shape[:3], value.shape[-1])
