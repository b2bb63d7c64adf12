"""Masks and log-probabilities against torch's own and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf import tensors
from rlhf.tensors import log_probs_and_entropy, mask_from_lengths, token_log_probs

ROWS = 11  # in chunks of four


def test_masks_count_from_lengths() -> None:
    lengths = torch.tensor([0, 2, 3])
    assert mask_from_lengths(lengths, 3).tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert mask_from_lengths(lengths, 3, start=1).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert mask_from_lengths(lengths, 3, start=torch.tensor([0, 1, 2])).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensors.CHUNK, "cpu", 4 * 7)


def random_logits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 5 * torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(1))
    return logits.to(dtype).requires_grad_(), torch.arange(ROWS) % 7


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropy_are_torchs(dtype: torch.dtype, temperature: float) -> None:
    logits, targets = random_logits(dtype)
    distribution = torch.distributions.Categorical(logits=logits.float() / temperature)
    found, entropies = log_probs_and_entropy(logits, targets, temperature)
    assert found.dtype == entropies.dtype == torch.float32  # worked out in full precision
    torch.testing.assert_close(found, distribution.log_prob(targets))
    torch.testing.assert_close(entropies, distribution.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(token_log_probs(logits, targets, temperature), found)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_autograds_and_no_copy_of_the_logits_is_kept(dtype: torch.dtype, entropy_weight: float) -> None:
    logits, targets = random_logits(dtype)
    weights = torch.linspace(-1, 1, ROWS)
    distribution = torch.distributions.Categorical(logits=logits.float() / 0.7)
    expected = distribution.log_prob(targets) @ weights + entropy_weight * (distribution.entropy() @ weights.cos())
    (gradient,) = torch.autograd.grad(expected, logits)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found, entropies = log_probs_and_entropy(logits, targets, 0.7)
    total = found @ weights + entropy_weight * (entropies @ weights.cos()) if entropy_weight else found @ weights
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], gradient)
    assert [tensor.data_ptr() == logits.data_ptr() for tensor in kept if tensor.ndim == 2] == [True]


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [1, 1e-30, 1e-30, 1e-30]]).log()
    _, found = log_probs_and_entropy(logits, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found, torch.tensor([math.log(4), 1.75 * math.log(2), 0.0]))
    # at temperature 1/2 every probability is squared: 4 : 1 : ¼ : ¼ (÷ 5.5)
    shares = [4 / 5.5, 1 / 5.5, 0.25 / 5.5, 0.25 / 5.5]
    _, found = log_probs_and_entropy(logits[1:2], torch.tensor([0]), 0.5)
    torch.testing.assert_close(found, torch.tensor([-sum(p * math.log(p) for p in shares)]))


def test_no_row_has_no_log_probs() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    found = token_log_probs(logits, torch.zeros(0, dtype=torch.long))
    found.sum().backward()
    assert found.shape == (0,)
    assert logits.grad is not None


def test_a_token_that_cannot_come_adds_nothing() -> None:
    logits, targets = random_logits()
    narrow = logits.detach()[:, :-1].clone().requires_grad_()
    with torch.no_grad():
        logits[:, -1] = -math.inf
    targets = targets.clamp(max=5)
    found = [log_probs_and_entropy(some, targets, 0.7) for some in (logits, narrow)]
    slopes = [torch.autograd.grad(torch.cat(made).cos().sum(), some) for made, some in zip(found, (logits, narrow), strict=True)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(slopes[0][0][:, :-1], slopes[1][0])
    assert not slopes[0][0][:, -1].any()


def test_an_entropy_alone_has_a_gradient() -> None:
    logits, targets = random_logits()
    found, entropies = log_probs_and_entropy(logits, targets)
    (alone,) = torch.autograd.grad(entropies.sum(), logits, retain_graph=True)
    torch.testing.assert_close(alone, torch.autograd.grad(entropies.sum() + 0 * found.sum(), logits)[0])
