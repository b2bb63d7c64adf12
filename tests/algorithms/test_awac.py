"""AWAC's weights and loss against numbers worked out by hand, and against the arithmetic that rlkit has."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algorithms.awac import advantages, awac_loss, effective_sample_size, weights

LN2, LN3 = math.log(2), math.log(3)


def test_an_answer_is_held_against_the_mean_of_its_prompt() -> None:
    rewards = torch.tensor([1.0, 5.0, 3.0, 5.0])
    assert advantages(rewards, torch.tensor([0, 1, 0, 1])).tolist() == [-1, 0, 1, 0]


def test_weights_by_hand() -> None:
    # exp(A / λ) is 1, 2 and 3: their mean is 2
    found = weights(torch.tensor([0.0, 0.5 * LN2, 0.5 * LN3]), temperature=0.5, most=20.0)
    assert found.tolist() == pytest.approx([0.5, 1.0, 1.5])
    # 3 is held at 2: the mean is 5/3
    held = weights(torch.tensor([0.0, LN2, LN3]), temperature=1.0, most=2.0)
    assert held.tolist() == pytest.approx([0.6, 1.2, 1.2])
    assert effective_sample_size(held) == pytest.approx(9 / (0.36 + 2 * 1.44))


def test_weights_are_finite_whatever_the_advantages() -> None:
    assert weights(torch.tensor([1e6, -1e6]), 1e-3, 20.0).tolist() == [2, 0]
    assert weights(torch.tensor([-1e6, -1e6]), 1e-3, 20.0).tolist() == [1, 1]
    assert [effective_sample_size(torch.tensor(row)) for row in ([1.0, 1.0, 1.0], [3.0, 0.0, 0.0])] == pytest.approx([3, 1])


def test_where_nothing_is_held_the_weights_are_those_of_rlkit() -> None:
    better, scale = torch.tensor([-1.3, 0.2, 0.9, 2.5]), 0.7
    # rlkit/torch/sac/awac_trainer.py: F.softmax(score / beta, dim=0), and len(weights) * weights where it counts the loss
    theirs = len(better) * torch.softmax(better / scale, dim=0)
    torch.testing.assert_close(weights(better, scale, most=math.inf), theirs)
    assert not torch.allclose(weights(better, scale, most=2.0), theirs)  # which has no bound


def test_the_loss_by_hand_and_its_gradient() -> None:
    log_probs = torch.tensor([-1.0, -4.0], requires_grad=True)
    loss = awac_loss(log_probs, torch.tensor([0.5, 1.5]), denominator=10)
    loss.backward()
    assert loss.item() == pytest.approx(0.65)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-0.05, -0.15])


def test_the_parts_of_a_batch_add_up_to_its_loss() -> None:
    log_probs, counted = torch.tensor([-1.0, -4.0, -2.0]), weights(torch.tensor([0.0, 1.0, 2.0]), 1.0, 20.0)
    whole = awac_loss(log_probs, counted, 12)
    parts = [awac_loss(log_probs[part], counted[part], 12) for part in ([0], [1, 2])]
    assert sum(parts).item() == pytest.approx(whole.item())  # type: ignore[union-attr]  # a sum of tensors, which is typed as int too
