"""The model that `rlhf chat` talks to: opened from its folder, answering token by token. Importing this takes seconds."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from rlhf.models.dialogues import encode_prompt
from rlhf.models.policy import context_tokens, load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling

Write = Callable[[str], Any]
Message = dict[str, str]


class Speaker:
    """A model with its way of answering.

    Args:
        folder: of a language model.
        temperature: at 0 the likeliest answer is given.
        max_tokens: of an answer, which takes half of the model's context at most: the rest is for the dialogue.
        stop_texts: an answer ends before the first of them.

    Raises:
        UserError: the folder holds no model with a chat template.
    """

    def __init__(self, folder: Path, temperature: float, max_tokens: int, stop_texts: Sequence[str]) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load_policy(folder, "fp32" if device == "cpu" else "bf16")
        self._model, self._tokenizer, self._stop_texts = model.to(device), load_tokenizer(folder), stop_texts
        context = context_tokens(model)
        self._sampling = Sampling(temperature, top_k=0, top_p=1.0, max_new_tokens=min(max_tokens, context // 2))
        self.room = context - self._sampling.max_new_tokens  # tokens of a dialogue

    def fits(self, dialogue: list[Message]) -> bool:
        """Whether a dialogue leaves room for an answer."""
        return len(encode_prompt(self._tokenizer, dialogue)) <= self.room

    def answer(self, dialogue: list[Message], write: Write) -> str:
        """One answer, written as it comes. Ctrl-C ends it early; what was written stays the answer."""
        streamer = _Streamer(self._tokenizer, self._stop_texts, write)
        prompt, seed = encode_prompt(self._tokenizer, dialogue), random.getrandbits(63)

        def stop(_: int, answer: list[int]) -> bool:
            streamer.put(torch.tensor(answer[-1:]))
            return streamer.stopped

        ids = {"eos_id": self._tokenizer.eos_token_id, "pad_id": self._tokenizer.pad_token_id}
        with contextlib.suppress(KeyboardInterrupt):
            generate(self._model, [prompt], [seed], self._sampling, **ids, slots=1, stop=stop)
        streamer.end()
        return streamer.written.strip()


class _Streamer(TextStreamer):
    """Tokens to text, held back until a character is whole and while it may be the beginning of a text to stop at."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_texts: Sequence[str], write: Write) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stop_texts, self.write = stop_texts, write
        self.written = self.held = ""
        self.stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.stopped:
            self.held += text
            ends = [self.held.index(stop) for stop in self.stop_texts if stop in self.held]
            self.stopped = bool(ends)
            begun = [i for i in range(len(self.held)) if any(stop.startswith(self.held[i:]) for stop in self.stop_texts)]
            clear = min(ends) if ends else len(self.held) if stream_end or not begun else begun[0]
            self.write(self.held[:clear])
            self.written += self.held[:clear]
            self.held = self.held[clear:]
        if stream_end:
            self.write("\n")
