"""Masks and log-probabilities against torch's own and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.tensors import CHUNK_TOKENS, entropy, mask_from_lengths, token_log_probs


def test_masks_count_from_lengths() -> None:
    lengths = torch.tensor([0, 2, 3])
    assert mask_from_lengths(lengths, 3).tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert mask_from_lengths(lengths, 3, start=1).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert mask_from_lengths(lengths, 3, start=torch.tensor([0, 1, 2])).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_log_probs_of_more_rows_than_a_chunk_and_at_a_temperature() -> None:
    logits = 5 * torch.randn(CHUNK_TOKENS + 3, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(CHUNK_TOKENS + 3) % 4
    for temperature in (1.0, 0.5):
        expected = (logits / temperature).log_softmax(-1)[torch.arange(len(targets)), targets]
        torch.testing.assert_close(token_log_probs(logits, targets, temperature), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_log_probs_is_autograds_and_keeps_no_copy_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(CHUNK_TOKENS + 3, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    targets, weights = torch.arange(CHUNK_TOKENS + 3) % 7, torch.linspace(-1, 1, CHUNK_TOKENS + 3)
    expected = (logits.float() / 0.7).log_softmax(-1)[torch.arange(len(targets)), targets] @ weights
    (gradient,) = torch.autograd.grad(expected, logits)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = token_log_probs(logits, targets, 0.7)
    torch.testing.assert_close(torch.autograd.grad(found @ weights, logits)[0], gradient)
    assert [tensor.data_ptr() == logits.data_ptr() for tensor in kept if tensor.ndim == 2] == [True]


def test_log_probs_of_half_precision_logits_are_worked_out_in_full_precision() -> None:
    logits, targets = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.arange(5)
    found = token_log_probs(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits.float().log_softmax(-1)[torch.arange(5), targets])


def test_entropy() -> None:
    logits = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [1, 1e-30, 1e-30, 1e-30]]).log()
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), 1.75 * math.log(2), 0.0]))
    # at temperature 1/2 every probability is squared: 4 : 1 : ¼ : ¼ (÷ 5.5)
    shares = [4 / 5.5, 1 / 5.5, 0.25 / 5.5, 0.25 / 5.5]
    torch.testing.assert_close(entropy(logits[1:2], 0.5), torch.tensor([-sum(p * math.log(p) for p in shares)]))


def test_entropy_of_more_rows_than_a_chunk() -> None:
    assert entropy(torch.zeros(CHUNK_TOKENS + 1, 2)).tolist() == [torch.tensor(2.0).log().item()] * (CHUNK_TOKENS + 1)
