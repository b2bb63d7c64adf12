"""From dialogues to token tensors, and which rows make up which step.

One encoding for all stages: a dialogue is cut where the chat template starts and ends an assistant turn, and each piece is tokenized for
itself. So the tokens that sft trains on, that the reward model reads and that PPO samples are the same ids.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue and a mask of the same length: 1 on each assistant turn's tokens, its end token included.

    What the template writes after the last end token is left out. A dialogue that ends in a user turn ends with the generation prompt.
    """
    ids: list[int] = []
    mask: list[int] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], answer_follows=True)
        after = _render(tokenizer, messages[: i + 1], answer_follows=False)
        if not (before.startswith(done) and after.startswith(before)):
            # a template that rewrites earlier turns: only the last answer can be learnt as it will be sampled
            ids, mask, done = [], [], ""
        answer = after[len(before) :] if after.startswith(before) else message["content"] + str(tokenizer.eos_token)
        answer = answer[: answer.rindex(str(tokenizer.eos_token)) + len(str(tokenizer.eos_token))]
        for piece, counted in ((before[len(done) :], 0), (answer, 1)):
            tokens = tokenizer.encode(piece, add_special_tokens=False)
            ids += tokens
            mask += [counted] * len(tokens)
        done = before + answer
    if messages[-1]["role"] != "assistant":
        whole = _render(tokenizer, messages, answer_follows=True)
        if not whole.startswith(done):
            ids, mask, done = [], [], ""
        tokens = tokenizer.encode(whole[len(done) :], add_special_tokens=False)
        ids += tokens
        mask += [0] * len(tokens)
    return ids, mask


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    """Token ids of a dialogue that ends in a user turn, up to where the assistant's answer begins."""
    return encode_dialogue(tokenizer, prompt)[0]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, answer_follows: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_follows))


@dataclass(frozen=True)
class Packed:
    """Sequences laid side by side in rows, so that next to no work is done on padding. None sees another: attention is block-diagonal.

    Models take a 4-D mask for this; it knows nothing of sliding windows, so sequences must not be longer than a model's window.
    """

    ids: Tensor  # (R, C)
    positions: Tensor  # (R, C) counted from each sequence's own start
    segments: Tensor  # (R, C) number of the sequence, −1 on padding
    starts: Tensor  # (B,) index of each sequence's first token in the flattened (R·C)
    lengths: Tensor  # (B,)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a Hugging Face model is called with."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": (same & causal)[:, None]}

    @property
    def last(self) -> Tensor:
        """(B,) index of each sequence's last token in the flattened (R·C)."""
        return self.starts + self.lengths - 1

    def spread(self, values: Sequence[Sequence[int]]) -> Tensor:
        """One number per token of each sequence → (R, C), 0 on padding."""
        flat = torch.zeros(self.ids.numel(), device=self.ids.device)
        for start, row in zip(self.starts.tolist(), values, strict=True):
            flat[start : start + len(row)] = torch.tensor(row, dtype=flat.dtype, device=flat.device)
        return flat.view(self.ids.shape)


MIN_WIDTH = 128  # of a packed row: wide enough for little waste, narrow enough for cheap attention


def pack(sequences: Sequence[Sequence[int]], pad_id: int, device: str | torch.device) -> Packed:
    """First-fit-decreasing packing into rows as wide as the longest sequence (at least MIN_WIDTH, at most all tokens)."""
    width = max(*map(len, sequences), min(MIN_WIDTH, sum(map(len, sequences))))
    rows: list[list[int]] = []  # sequence numbers
    used: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        length = len(sequences[number])
        place = next((i for i, tokens in enumerate(used) if tokens + length <= width), None)
        if place is None:
            place = len(rows)
            rows.append([])
            used.append(0)
        rows[place].append(number)
        used[place] += length
    ids, positions, segments = [], [], []
    starts = [0] * len(sequences)
    for r, numbers in enumerate(rows):
        padding = width - used[r]
        at = r * width
        for number in numbers:
            starts[number] = at
            at += len(sequences[number])
        ids.append([token for number in numbers for token in sequences[number]] + [pad_id] * padding)
        positions.append([t for number in numbers for t in range(len(sequences[number]))] + [0] * padding)
        segments.append([number for number in numbers for _ in sequences[number]] + [-1] * padding)
    tensors = [torch.tensor(value, device=device) for value in (ids, positions, segments, starts, [len(s) for s in sequences])]
    return Packed(*tensors)


def pad_rows(rows: Sequence[Sequence[float]], value: float, device: str | torch.device) -> Tensor:
    """Rows of different lengths → (B, T), padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


@dataclass(frozen=True)
class Order:
    """Which rows make up which step: each epoch a fresh permutation, the epochs one after the other.

    A function of the step alone, so that a resumed run needs no state to find its place.
    """

    rows: int
    batch_size: int
    seed: int

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.rows / self.batch_size))

    def batch(self, step: int) -> list[int]:
        """Row indices of step 0, 1, 2, …"""
        first = step * self.batch_size
        return [_permutation(self.rows, self.seed, at // self.rows)[at % self.rows] for at in range(first, first + self.batch_size)]


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, width: int) -> list[list[int]]:
    """Passages one after the other, each with its end token, cut into rows of one width. What is left over at the end is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return [stream[i : i + width] for i in range(0, len(stream) - width + 1, width)]
