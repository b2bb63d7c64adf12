"""From dialogues to token tensors, and which rows make up which step.

One encoding for all stages: a dialogue is cut where the chat template starts and ends an assistant turn, and each piece is tokenized for
itself. So the tokens that sft trains on, that the reward model reads and that PPO samples are the same ids.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class Packed:
    """Sequences laid side by side in rows, so that next to no work is done on padding. None sees another: attention is block-diagonal.

    Sequences that begin alike, such as the two answers of a preference pair, may share that beginning: it stands there once, and each
    one's own part sees it and itself.

    Models take a 4-D mask for this; it knows nothing of sliding windows, so sequences must not be longer than a model's window.
    """

    ids: Tensor  # (R, C)
    positions: Tensor  # (R, C) counted from each sequence's own start
    segments: Tensor  # (R, C) number of the block, −1 on padding: a sequence, or several with their common beginning
    branches: Tensor | None  # (R, C) 0 on a common beginning, 1, 2, … on what follows it; None: nothing is shared
    places: Tensor  # (B, T) where each token of each sequence stands in the flattened (R·C); 0 beyond its end
    lengths: Tensor  # (B,)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a Hugging Face model is called with."""
        seen = self.segments[:, :, None] == self.segments[:, None, :]
        if self.branches is not None:
            seen &= (self.branches[:, None, :] == 0) | (self.branches[:, :, None] == self.branches[:, None, :])
        causal = torch.ones(seen.shape[1:], dtype=torch.bool, device=seen.device).tril()
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": (seen & causal)[:, None]}

    @property
    def last(self) -> Tensor:
        """(B,) index of each sequence's last token in the flattened (R·C)."""
        return self.places.gather(1, self.lengths[:, None] - 1).squeeze(1)

    def spread(self, values: Sequence[Sequence[int]]) -> Tensor:
        """One number per token of each sequence → (R, C), 0 on padding."""
        flat = torch.zeros(self.ids.numel(), device=self.ids.device)
        within = torch.arange(self.places.shape[1], device=self.ids.device) < self.lengths[:, None]
        flat[self.places[within]] = torch.tensor([value for row in values for value in row], dtype=flat.dtype, device=flat.device)
        return flat.view(self.ids.shape)


MIN_WIDTH = 128  # of a packed row: wide enough for little waste, narrow enough for cheap attention


def pack(sequences: Sequence[Sequence[int]], pad_id: int, device: str | torch.device, *, together: int = 1) -> Packed:
    """First-fit-decreasing packing into rows as wide as the longest block (at least MIN_WIDTH, at most all tokens).

    Args:
        together: so many sequences, one after the other, are a block: what they all begin with is laid out, and computed, once.
    """
    blocks = [sequences[i : i + together] for i in range(0, len(sequences), together)]
    common = [_common(block) if together > 1 else 0 for block in blocks]
    sizes = [shared + sum(len(sequence) - shared for sequence in block) for block, shared in zip(blocks, common, strict=True)]
    width = max(*sizes, min(MIN_WIDTH, sum(sizes)))
    rows: list[list[int]] = []  # numbers of blocks
    used: list[int] = []
    for number in sorted(range(len(blocks)), key=lambda i: -sizes[i]):
        row = next((i for i, tokens in enumerate(used) if tokens + sizes[number] <= width), None)
        if row is None:
            row = len(rows)
            rows.append([])
            used.append(0)
        rows[row].append(number)
        used[row] += sizes[number]
    ids, positions, segments, branches = list[int](), list[int](), list[int](), list[int]()
    places: list[list[int]] = [[]] * len(sequences)
    for numbers in rows:
        start = len(ids)
        for number in numbers:
            shared = common[number]
            beginning = list(range(len(ids), len(ids) + shared))
            ids += blocks[number][0][:shared]
            positions += range(shared)
            branches += [0] * shared
            for branch, sequence in enumerate(blocks[number]):
                own = len(sequence) - shared
                places[number * together + branch] = [*beginning, *range(len(ids), len(ids) + own)]
                ids += sequence[shared:]
                positions += range(shared, len(sequence))
                branches += [branch + 1] * own
            segments += [number] * sizes[number]
        padding = start + width - len(ids)
        ids += [pad_id] * padding
        positions += [0] * padding
        segments += [-1] * padding
        branches += [0] * padding

    def laid_out(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device).view(len(rows), width)

    return Packed(
        ids=laid_out(ids),
        positions=laid_out(positions),
        segments=laid_out(segments),
        branches=laid_out(branches) if any(common) else None,
        places=pad_rows(places, 0, device),
        lengths=torch.tensor([len(sequence) for sequence in sequences], device=device),
    )


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """With how many tokens all of them begin."""
    alike = (len(set(tokens)) == 1 for tokens in zip(*sequences, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def pad_rows(rows: Sequence[Sequence[float]], value: float, device: str | torch.device) -> Tensor:
    """Rows of different lengths → (B, T), padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


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
