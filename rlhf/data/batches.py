"""From dialogues to token tensors, and which rows make up which step.

One encoding for all stages: a dialogue is cut where the chat template starts and ends an assistant turn, and each piece is tokenized for
itself. So the tokens that sft trains on, that the reward model reads and that PPO samples are the same ids.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.pieces import Piece, Ragged
from rlhf.tensors import send

Messages = Sequence[dict[str, str]]
Frozen = tuple[tuple[tuple[str, str], ...], ...]  # messages that can be looked up
Encoded = tuple[list[int], list[int]]  # token ids and mask


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Encoded:
    """Token ids of a dialogue and a mask of the same length: 1 on each assistant turn's tokens, its end token included.

    What the template writes after the last end token is left out. A dialogue that ends in a user turn ends with the generation prompt.
    """
    return encode_dialogues(tokenizer, [messages])[0]


def encode_dialogues(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Messages]) -> list[Encoded]:
    """What `encode_dialogue` makes of each: every distinct text is rendered and tokenized once, and all of them in one call."""
    frozen = [tuple(tuple(message.items()) for message in messages) for messages in dialogues]
    before = _render(tokenizer, [part for messages in frozen for part in _before_answers(messages)], answer_follows=True)
    after = _render(tokenizer, [part for messages in frozen for part in _after_answers(messages)], answer_follows=False)
    end = str(tokenizer.eos_token)
    cut = [_pieces(messages, before, after, end) for messages in frozen]
    texts = list(dict.fromkeys(text for pieces in cut for text, _ in pieces))
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)) if texts else {}
    return [
        ([token for text, _ in pieces for token in ids[text]], [counted for text, counted in pieces for _ in ids[text]]) for pieces in cut
    ]


def _answers(messages: Frozen) -> list[int]:
    return [i for i, message in enumerate(messages) if dict(message)["role"] == "assistant"]


def _before_answers(messages: Frozen) -> list[Frozen]:
    """What stands before each answer: the whole of a dialogue that ends in a user turn, too."""
    answers = _answers(messages)
    return [messages[:i] for i in answers] + ([] if len(messages) - 1 in answers else [messages])


def _after_answers(messages: Frozen) -> list[Frozen]:
    return [messages[: i + 1] for i in _answers(messages)]


def _render(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[Frozen], *, answer_follows: bool) -> dict[Frozen, str]:
    distinct = list(dict.fromkeys(dialogues))
    plain = [list(map(dict, messages)) for messages in distinct]
    texts = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer_follows) if plain else []
    return dict(zip(distinct, texts, strict=True))


def _pieces(messages: Frozen, rendered_before: dict[Frozen, str], rendered_after: dict[Frozen, str], end: str) -> list[tuple[str, int]]:
    """The text of a dialogue, cut where answers begin and end; each piece with its mask."""
    pieces: list[tuple[str, int]] = []
    done = ""
    answers = _answers(messages)
    for i in answers:
        before, after = rendered_before[messages[:i]], rendered_after[messages[: i + 1]]
        if not (before.startswith(done) and after.startswith(before)):
            # a template that rewrites earlier turns: only the last answer can be learnt as it will be sampled
            pieces, done = [], ""
        answer = after[len(before) :] if after.startswith(before) else dict(messages[i])["content"] + end
        answer = answer[: answer.rindex(end) + len(end)]
        pieces += [(before[len(done) :], 0), (answer, 1)]
        done = before + answer
    if len(messages) - 1 not in answers:
        whole = rendered_before[messages]
        if not whole.startswith(done):
            pieces, done = [], ""
        pieces.append((whole[len(done) :], 0))
    return pieces


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    """Token ids of a dialogue that ends in a user turn, up to where the assistant's answer begins."""
    return encode_dialogue(tokenizer, prompt)[0]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


SHARED = 16  # tokens: a piece of its own costs some operations in each layer, which fewer would hardly save


@dataclass(frozen=True)
class Packed:
    """Sequences laid side by side in one row, so that no work is done on padding. None sees another (rlhf/models/attention.py).

    What sequences begin alike with stands there once: a system prompt, or the prompt of a preference pair or of several answers. Each one's
    own part sees it and itself.

    Attention knows nothing of sliding windows here, so sequences must not be longer than a model's window.

    It stands in the processor's memory; what a model needs of it is sent to the model's device, where nothing waits for it.
    """

    device: torch.device  # of the model
    ids: Tensor  # (1, N)
    positions: Tensor  # (1, N) counted from each sequence's own start
    pieces: Sequence[Piece]  # in the order of the row
    runs: Sequence[Sequence[slice]]  # B: where each sequence stands in the row, beginning first
    places: Tensor  # (B, T) the same for each token; 0 beyond its end
    lengths: Tensor  # (B,)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with; one that does not hand the pieces on to its attention is known by the mask, which fits nothing."""
        return {
            "input_ids": send(self.ids, self.device),
            "position_ids": send(self.positions, self.device),
            "attention_mask": torch.empty(1, 1, 0, 0, device=self.device),
            "pieces": self.pieces if self.device.type == "cpu" else Ragged.of(self.pieces, self.device),
        }

    def read_at(self, places: Tensor) -> dict[str, Any]:
        """`inputs` of a forward pass of which nothing is read but what it makes at some places of the row."""
        read = places.unique()
        return self.inputs | ({"read": send(read, self.device)} if 2 * len(read) <= self.ids.shape[1] else {})

    @property
    def last(self) -> Tensor:
        """(B,) place of each sequence's last token in the row."""
        return self.places.gather(1, self.lengths[:, None] - 1).squeeze(1)

    def predictions(self, masks: Sequence[Sequence[int]]) -> Predictions:
        """Where the tokens with mask 1 are predicted, sequence by sequence; a sequence's first token is never."""
        row, token = pad_rows([[0, *mask[1:]] for mask in masks], 0).nonzero(as_tuple=True)
        targets = self.ids[0, self.places[row, token]]
        return Predictions(self.places[row, token - 1], send(targets, self.device), send(row, self.device))


@dataclass(frozen=True)
class Predictions:
    """The tokens whose log-probabilities are wanted, n of them: logits are computed for these alone."""

    places: Tensor  # (n,) of the token before each one, whose output predicts it
    targets: Tensor  # (n,) the tokens, on the model's device
    rows: Tensor  # (n,) number of the sequence of each, on the model's device


def pack(sequences: Sequence[Sequence[int]], device: str | torch.device) -> Packed:
    """Lay sequences side by side for a model on a device; those that begin alike share the beginning."""
    row, positions = list[int](), list[int]()
    pieces: list[Piece] = []
    runs: list[list[slice]] = [[] for _ in sequences]

    def lay(group: Sequence[int], first: int, end: int, after: int | None) -> int:
        """Add tokens [first, end) that each of some sequences has; the number of their piece."""
        start = len(row)
        row.extend(sequences[group[0]][first:end])
        positions.extend(range(first, end))
        pieces.append(Piece(end - first, after))
        for i in group:
            runs[i].append(slice(start, len(row)))
        return len(pieces) - 1

    def lay_all(group: Sequence[int], first: int, after: int | None) -> None:
        """Add all tokens from the first one on of sequences whose tokens before it stand in the row already."""
        alike: dict[Any, list[int]] = {}
        for i in group:
            begin = tuple(sequences[i][first : first + SHARED])
            alike.setdefault(begin if len(begin) == SHARED else i, []).append(i)
        for some in alike.values():
            if len(some) == 1:
                lay(some, first, len(sequences[some[0]]), after)
                continue
            end = first + begin_alike([tuple(sequences[i][first:]) for i in some])
            shared = lay(some, first, end, after)
            lay_all([i for i in some if len(sequences[i]) > end], end, shared)

    lay_all(range(len(sequences)), 0, None)
    return Packed(
        device=torch.device(device),
        ids=torch.tensor([row]),
        positions=torch.tensor([positions]),
        pieces=pieces,
        runs=runs,
        places=pad_rows([[place for run in each for place in range(run.start, run.stop)] for each in runs], 0),
        lengths=torch.tensor([len(sequence) for sequence in sequences]),
    )


def begin_alike(sequences: Sequence[tuple[int, ...]]) -> int:
    """With how many tokens all of them begin."""
    first, last = min(sequences), max(sequences)  # in order, and what these two begin with stands in all between them
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))


def pad_rows(rows: Sequence[Sequence[float]], value: float) -> Tensor:
    """Rows of different lengths → (B, T), padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


@dataclass(frozen=True, eq=False)
class Order:
    """Which rows make up which step: each epoch a fresh permutation, the epochs one after the other.

    With `lengths` the rows of a batch are of similar length, but for a batch that lies across two epochs. A function of the step alone,
    so that a resumed run needs no state to find its place.
    """

    rows: int
    batch_size: int
    seed: int
    lengths: Sequence[int] | None = None  # of each row; None: any rows may meet in a batch

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.rows / self.batch_size))

    def batch(self, step: int) -> list[int]:
        """Row indices of step 0, 1, 2, …"""
        first = step * self.batch_size
        return [_permutation(self, at // self.rows)[at % self.rows] for at in range(first, first + self.batch_size)]


@lru_cache(maxsize=4)
def _permutation(order: Order, epoch: int) -> list[int]:
    generator = random.Random(f"{order.seed}/{epoch}")
    rows = list(range(order.rows))
    generator.shuffle(rows)
    return rows if order.lengths is None else _grouped(rows, order.lengths, order.batch_size, -epoch * order.rows, generator)


WINDOW = 32  # at most so many batches' worth of shuffled rows is sorted by length, and a quarter of an epoch: each epoch has new batches


def _grouped(rows: list[int], lengths: Sequence[int], size: int, boundary: int, generator: random.Random) -> list[int]:
    """Shuffled rows so ordered that the batches which lie in this epoch hold rows of similar length; the batches in random order.

    Args:
        boundary: a place where a batch begins, modulo `size`.
    """
    begin = min(boundary % size, len(rows))
    end = len(rows) - (len(rows) - begin) % size
    width = size * max(1, min(WINDOW, (end - begin) // size // 4))
    batches: list[list[int]] = []
    for start in range(begin, end, width):
        near = sorted(rows[start : min(start + width, end)], key=lengths.__getitem__)
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    generator.shuffle(batches)
    return [*rows[:begin], *(row for batch in batches for row in batch), *rows[end:]]


def blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, width: int) -> list[list[int]]:
    """Passages one after the other, each with its end token, cut into rows of one width. What is left over at the end is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return [stream[i : i + width] for i in range(0, len(stream) - width + 1, width)]
