"""`rlhf chat`: a dialogue with a model in the terminal, token by token. Lines come from anywhere, so a pipe works as well."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from rlhf.data.batches import encode_prompt
from rlhf.errors import UserError
from rlhf.models.policy import load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.generate import Sampling, generate

Write = Callable[[str], Any]
Message = dict[str, str]


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Open a model folder for chatting.

    Raises:
        UserError: it is not the folder of a language model with a chat template.
    """
    remedy = "name the folder of a language model, for example models/ppo"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", remedy=remedy)
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: no Hugging Face model (its config.json is missing or names no architecture)", remedy=remedy) from None
    # transformers would open a reward model as well, with a random head for words
    if not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise UserError(f"{folder}: a {', '.join(architectures)} does not write text", remedy=remedy)
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_policy(folder, "fp32" if device == "cpu" else "bf16")
    return model.to(device), load_tokenizer(folder)


def converse(folder: Path, lines: Iterable[str], write: Write, temperature: float, max_tokens: int) -> None:
    """Answer each line, remembering the dialogue, until /quit or the end; /reset forgets it.

    At temperature 0 the likeliest answer is given. An answer takes half of the model's context at most, and the rest is for the dialogue.

    Raises:
        UserError: the folder is no model to chat with.
    """
    model, tokenizer = load(folder)
    context = getattr(model.config, "max_position_embeddings", 4096)
    sampling = Sampling(temperature, top_k=0, top_p=1.0, max_new_tokens=min(max_tokens, context // 2))
    dialogue: list[Message] = []
    for line in map(str.strip, lines):
        if line == "/quit":
            break
        if line == "/reset":
            dialogue = []
            write("(new dialogue)\n")
        elif line:
            dialogue.append({"role": "user", "content": line})
            while dialogue and len(encode_prompt(tokenizer, dialogue)) > context - sampling.max_new_tokens:
                dialogue = dialogue[2:]  # the oldest exchange goes first
            if dialogue:
                dialogue.append({"role": "assistant", "content": _answer(model, tokenizer, dialogue, sampling, write)})
            else:
                write(f"(too long: the model takes {context - sampling.max_new_tokens} tokens)\n")


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, dialogue: list[Message], sampling: Sampling, write: Write) -> str:
    """One answer, written as it comes. Ctrl-C ends it early; what was written stays the answer."""
    streamer = _Streamer(tokenizer, write)
    prompt, seed = encode_prompt(tokenizer, dialogue), random.getrandbits(63)
    ends: dict[str, Any] = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    with contextlib.suppress(KeyboardInterrupt):
        generate(model, [prompt], [seed], sampling, on_token=lambda token: streamer.put(torch.tensor([token])), **ends)
    streamer.end()
    return "".join(streamer.parts).strip()


class _Streamer(TextStreamer):
    """Tokens to text, held back until a character is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write = write
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self.write(text + "\n" * stream_end)
