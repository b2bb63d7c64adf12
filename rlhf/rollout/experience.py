"""What a policy learns from: scored answers, and their layout for a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.models.packed import Packed, pack
from rlhf.rewards.scoring import Outcome
from rlhf.tensors import mask_from_lengths, send


@dataclass(frozen=True)
class Scored:
    """One answer and what the models say of it; tensors (A,) have one number per answer token."""

    prompt: list[int]
    answer: list[int]  # end token included where it ended by itself
    ended: bool
    score: float  # what is trained on: the sum over section rewards
    log_probs: Tensor  # (A,) under the policy that sampled, as training computes them
    rollout_log_probs: Tensor  # (A,) the same, as the rollout computed them
    reference_log_probs: Tensor  # (A,)
    values: Tensor  # (A,) V(s) before each answer token; (0,) without a critic
    rewards: Mapping[str, Outcome] = field(default_factory=dict)  # by entry of section rewards


@dataclass(frozen=True)
class Experience:
    """A whole rollout batch, the same on every rank: B answers, A positions of the longest one.

    It is small (numbers per answer token), so each rank holds all of it. Whitening and statistics need no exchange, and a mini-batch is
    the same rows on any number of ranks.
    """

    sequences: list[list[int]]  # B: prompt and answer
    prompt_lengths: list[int]  # B
    mask: Tensor  # (B, A) 1 on answer tokens, end token included
    ended: Tensor  # (B,) whether the answer ended by itself
    scores: Tensor  # (B,)
    log_probs: Tensor  # (B, A)
    rollout_log_probs: Tensor  # (B, A)
    reference_log_probs: Tensor  # (B, A)
    values: Tensor  # (B, A); (B, 0) without a critic
    rewards: Sequence[Mapping[str, Outcome]] = ()  # B, by entry of section rewards

    @classmethod
    def of(cls, rows: Sequence[Scored], device: torch.device) -> Experience:
        def padded(tensors: list[Tensor]) -> Tensor:
            return pad_sequence(tensors, batch_first=True).to(device)

        log_probs = padded([row.log_probs for row in rows])
        return cls(
            sequences=[row.prompt + row.answer for row in rows],
            prompt_lengths=[len(row.prompt) for row in rows],
            mask=mask_from_lengths(torch.tensor([len(row.answer) for row in rows], device=device), log_probs.shape[1]),
            ended=torch.tensor([row.ended for row in rows], device=device),
            scores=torch.tensor([row.score for row in rows], device=device),
            log_probs=log_probs,
            rollout_log_probs=padded([row.rollout_log_probs for row in rows]),
            reference_log_probs=padded([row.reference_log_probs for row in rows]),
            values=padded([row.values for row in rows]),
            rewards=[row.rewards for row in rows],
        )


@dataclass(frozen=True)
class Layout:
    """Answers laid out for a forward pass: a packed row, and where each answer token's prediction stands in it."""

    packed: Packed
    before: Tensor  # (n,) place of the token before each answer token; its output predicts it
    targets: Tensor  # (n,) the answer tokens, on the models' device
    cells: Tensor  # (n,) number of each one's cell of (B, A), on the models' device
    shape: tuple[int, int]  # B, A

    @classmethod
    def of(
        cls,
        sequences: Sequence[list[int]],
        prompt_lengths: Sequence[int],
        width: int,
        device: torch.device,
        closings: Sequence[list[int]] | None = None,
    ) -> Layout:
        """Of prompts with their answers, none of more tokens than `width`, for models on a device.

        Args:
            closings: tokens behind each answer, which are no part of it.
        """
        masks = [[0] * prompt + [1] * (len(sequence) - prompt) for sequence, prompt in zip(sequences, prompt_lengths, strict=True)]
        if closings:
            sequences = [sequence + closing for sequence, closing in zip(sequences, closings, strict=True)]
            masks = [mask + [0] * len(closing) for mask, closing in zip(masks, closings, strict=True)]
        packed = pack(sequences, device)
        answered = packed.predictions(masks)
        answers = torch.tensor([sum(mask) for mask in masks])
        cells = mask_from_lengths(answers, width).flatten().nonzero().squeeze(1)
        return cls(packed, answered.places, answered.targets, send(cells, device), (len(masks), width))

    def fill(self, values: Tensor) -> Tensor:
        """One number per answer token (n,) → (B, A), 0 beyond each answer's end."""
        rows, width = self.shape
        return values.new_zeros(rows * width).index_copy(0, self.cells, values).view(rows, width)
