"""A model that writes in slots: it reads a prompt, and gives what may follow in all slots in use at once.

No slot's logits hang on what is in the others, not even in their last bit. On a CPU oneDNN makes a row of a product as it would alone, if
the weights are laid out beforehand; attention goes over one prompt at a time, and later over whole vectors of columns; activations go by
rows. On a GPU a prompt is read by itself, and every step has the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.models.packed import pack
from rlhf.models.policy import context_tokens, load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.cache import Layer, SlotCache, attending, parts_of
from rlhf.rollout.products import laid_out
from rlhf.serving.activations import by_rows


class Writer:
    """A model, opened from its folder.

    Args:
        folder: of a language model.
        slots: answers at a time.
        most_tokens: of a prompt with its answer; fewer where the model takes fewer.

    Raises:
        UserError: the folder holds no model with a chat template.
    """

    def __init__(self, folder: Path, slots: int, most_tokens: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load_policy(folder, "fp32" if device == "cpu" else "bf16")
        self._model = model.to(device)
        self.tokenizer = load_tokenizer(folder)
        self.eos_id = self.tokenizer.eos_token_id
        self.capacity = min(most_tokens, context_tokens(model))
        self._cache = SlotCache(slots, self.capacity, alone=True)
        self._ready = ExitStack()
        self._ready.enter_context(attending(self._model))
        self._ready.enter_context(laid_out(self._model))
        self._ready.enter_context(by_rows(self._model))

    def read(self, prompts: Sequence[Sequence[int]]) -> list[tuple[list[Layer], Tensor]]:
        """What answers to each prompt start from: its keys and values, and the logits (V,) of what follows."""
        device = self._model.device
        if device.type != "cpu" and len(prompts) > 1:
            return [found for prompt in prompts for found in self.read([prompt])]
        packed = pack(prompts, device, share=False)  # a beginning that is shared would be attended to in another order of sums
        with self._cache.reading() as layers:
            inputs = packed.read_at(packed.last)
            read = self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=packed.last)
        return [(parts_of(packed, layers, number), read.logits[0, number].float()) for number in range(len(prompts))]

    def place(self, slot: int, layers: Sequence[Layer]) -> None:
        self._cache.place(slot, layers)

    def move(self, source: int, target: int, length: int) -> None:
        self._cache.move(source, target, length)

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Logits (B, V) of what follows in each slot in use, fp32.

        Args:
            tokens: the last one of each slot.
            lengths: tokens that each slot holds without it.
        """
        device, count = self._model.device, len(tokens)
        if device.type == "cpu":
            inputs = self._cache.decode(lengths, self._model.dtype, device)
        else:
            free = [0] * (self._cache.slots - count)
            tokens, lengths = [*tokens, *free], [*lengths, *free]
            inputs = self._cache.decode_at_once(torch.tensor(lengths, device=device))
        ids = torch.tensor(tokens, device=device)[:, None]
        return self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **inputs).logits[:count, -1].float()

    def close(self) -> None:
        self._ready.close()
