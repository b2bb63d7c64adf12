"""`rlhf chat`: a dialogue with a model in the terminal, token by token. Lines come from anywhere, so a pipe works as well."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from rlhf.errors import UserError
from rlhf.models.dialogues import encode_prompt
from rlhf.models.policy import context_tokens, load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling

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


def converse(folder: Path, lines: Iterable[str], write: Write, temperature: float, max_tokens: int, stop_texts: Sequence[str] = ()) -> None:
    """Answer each line, remembering the dialogue, until /quit or the end; /reset forgets it.

    At temperature 0 the likeliest answer is given. An answer takes half of the model's context at most, and the rest is for the dialogue.

    Args:
        stop_texts: an answer ends before the first of them.

    Raises:
        UserError: the folder is no model to chat with.
    """
    model, tokenizer = load(folder)
    context = context_tokens(model)
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
                answer = _answer(model, tokenizer, dialogue, sampling, stop_texts, write)
                dialogue.append({"role": "assistant", "content": answer})
            else:
                write(f"(too long: the model takes {context - sampling.max_new_tokens} tokens)\n")


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, dialogue: list[Message], sampling: Sampling, stop_texts: Sequence[str], write: Write
) -> str:
    """One answer, written as it comes. Ctrl-C ends it early; what was written stays the answer."""
    streamer = _Streamer(tokenizer, stop_texts, write)
    prompt, seed = encode_prompt(tokenizer, dialogue), random.getrandbits(63)

    def stop(_: int, answer: list[int]) -> bool:
        streamer.put(torch.tensor(answer[-1:]))
        return streamer.stopped

    with contextlib.suppress(KeyboardInterrupt):
        generate(model, [prompt], [seed], sampling, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, slots=1, stop=stop)
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
