"""How long a sequence may be that a model computes rightly here: told from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# families whose layers hand their window on (rlhf/models/options.py), though their configuration does not say which of them have it
WINDOWED = frozenset({"ministral3", "mistral", "mixtral", "phi3", "phi4_multimodal", "qwen3_moe", "starcoder2"})


def limits(config: Any) -> dict[str, int]:
    """The most tokens of a sequence, by what limits them."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    found = {"number of positions": getattr(text, "max_position_embeddings", None)}
    if not kinds and text.model_type not in WINDOWED:
        found["sliding attention window"] = getattr(text, "sliding_window", None)
    if "chunked_attention" in kinds:
        found["chunks of attention"] = text.attention_chunk_size
    # one token beyond it changes all positions: those of shorter sequences beside it, and of an answer's tokens that stand there already
    longrope = [rope["original_max_position_embeddings"] for rope in ropes(text) if rope["rope_type"] == "longrope"]
    found["positions before longrope changes them"] = min(longrope, default=None)
    return {name: limit for name, limit in found.items() if limit is not None}


def ropes(text: Any) -> Iterator[dict[str, Any]]:
    """The parameters of each kind of rotary positions in the configuration of a language model."""
    given = getattr(text, "rope_parameters", None) or {}
    # of all layers alike, or of each type of layer
    yield from [given] if "rope_type" in given else [rope for rope in given.values() if isinstance(rope, dict)]
