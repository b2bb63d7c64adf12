"""RRHF's loss by hand, however it is cut, and against the released arithmetic; and which answers make a pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.pairing import pair
from rlhf.algorithms.rrhf import rrhf_loss

# Two prompts: three answers of 2, 4 and 1 tokens, with means −1, −0.5 and −3; two of 3 and 2, with means −2 and −1, equally good.
LOG_PROBS = torch.tensor([[-2.0, -2.0, -3.0], [-6.0, -2.0, 0.0]])
LENGTHS = torch.tensor([[2.0, 4.0, 1.0], [3.0, 2.0, 0.0]])
REWARDS = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
THERE = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def test_the_loss_by_hand() -> None:
    loss, stats = rrhf_loss(LOG_PROBS, LENGTHS, REWARDS, THERE, THERE, 1.0, 10.0, ranked_prompts=1, best_tokens=2 + 3)
    # of three pairs one is in the wrong order: the second answer, worse than the first, is likelier by 0.5; the other prompt has no pair
    assert stats["ranking_loss"].item() == pytest.approx(0.5 / 3)
    # the best answers: the first of each prompt, of equally good ones the first; 2 + 3 tokens
    assert stats["best_loss"].item() == pytest.approx((2 + 6) / 5)
    assert loss.item() == pytest.approx(10 * 0.5 / 3 + 8 / 5)
    assert stats["in_order"].item() == pytest.approx(2 / 3)


def test_an_answer_that_was_cut_off_is_no_better_one() -> None:
    ended = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    _, stats = rrhf_loss(LOG_PROBS, LENGTHS, REWARDS, THERE, ended, 1.0, 1.0, ranked_prompts=1, best_tokens=4 + 2)
    # what is left is the pair of the second and the third answer, in order
    assert stats["ranking_loss"].item() == 0
    assert stats["in_order"].item() == 1
    assert stats["best_loss"].item() == pytest.approx((2 + 2) / 6)
    # as the worse one it counts: the first answer, cut off, is likelier than the third, which is better here
    _, stats = rrhf_loss(LOG_PROBS[:1], LENGTHS[:1], -REWARDS[:1], THERE[:1], ended[:1], 1.0, 1.0, ranked_prompts=1, best_tokens=1)
    assert stats["ranking_loss"].item() == pytest.approx((2.0 + 2.5) / 3)


def test_without_the_exponent_sums_are_ranked() -> None:
    _, stats = rrhf_loss(LOG_PROBS, LENGTHS, REWARDS, THERE, THERE, 0.0, 1.0, ranked_prompts=1, best_tokens=5)
    assert stats["ranking_loss"].item() == 0  # −2, −2, −3
    assert stats["in_order"].item() == pytest.approx(2 / 3)  # equally likely is not in order


def test_any_cut_has_the_same_loss_and_gradient_and_padding_none() -> None:
    def gradient(parts: list[slice], *, padding: int) -> tuple[float, Tensor]:
        log_probs = LOG_PROBS.clone().requires_grad_()
        total = torch.zeros(())
        for part in parts:
            a, b, c, d = (torch.nn.functional.pad(one[part], (0, padding)) for one in (log_probs, LENGTHS, REWARDS, THERE))
            loss, _ = rrhf_loss(a, b, c, d, d, 1.0, 2.0, 1, 5)
            total = total + loss
        total.backward()
        assert log_probs.grad is not None
        return total.item(), log_probs.grad

    whole, expected = gradient([slice(0, 2)], padding=0)
    for parts, padding in (([slice(0, 1), slice(1, 2)], 0), ([slice(0, 2)], 3)):
        loss, found = gradient(parts, padding=padding)
        assert loss == pytest.approx(whole)
        torch.testing.assert_close(found, expected)


def test_more_answers_alike_do_not_change_the_scale() -> None:
    def loss(times: int) -> float:
        a, b, c, d = (torch.cat([one[:1]] * times, dim=1) for one in (LOG_PROBS, LENGTHS, REWARDS, THERE))
        return rrhf_loss(a, b, c, d, d, 1.0, 1.0, 1, 2)[0].item()

    assert loss(2) == pytest.approx(loss(1))


def released(token_log_probs: Tensor, mask: Tensor, rewards: Tensor) -> tuple[float, float]:
    """Ranking and best-of loss of one prompt, as GanjinZero/RRHF's train.py computes them from (k, L) log-probabilities."""
    found = token_log_probs * mask
    scores = found.sum(-1) / mask.sum(-1) ** 1.0
    difference = scores.unsqueeze(0) - scores.unsqueeze(-1)
    reward_difference = rewards.unsqueeze(0) - rewards.unsqueeze(-1)
    wrong = torch.bitwise_and(reward_difference > 0, difference < 0)
    return -difference[wrong].sum().item(), -found[rewards.argmax()].mean().item()


def test_the_released_arithmetic_differs_by_its_two_denominators_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths, width = torch.tensor([3, 7, 5, 2, 6]), 9
    mask = (torch.arange(width)[None] < lengths[:, None]).float()
    tokens = -torch.rand(5, width, generator=generator) * mask
    rewards = torch.tensor([0.3, 1.2, -0.5, 0.3, 0.9])
    ranking, best = released(tokens, mask, rewards)
    row = (tokens.sum(-1)[None], lengths[None].float(), rewards[None], torch.ones(1, 5), torch.ones(1, 5))
    _, stats = rrhf_loss(*row, 1.0, 1.0, ranked_prompts=1, best_tokens=7)
    # it sums the 9 pairs of different rewards, and divides by the padded length
    assert stats["ranking_loss"].item() * 9 == pytest.approx(ranking, rel=1e-5)
    assert stats["best_loss"].item() * 7 / width == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("rewards", "rejected", "expected"),
    [
        ([0.0, 2.0, -1.0], "worst", (1, 2)),
        ([1.0, 1.0], "worst", None),
        ([1.0, 1.0], "two-sigma", None),
        # mean 0, deviation 1.17: −2.35 is nearest to −2.1, not to the outlier
        ([0.1] * 60 + [5.0, -2.1, -8.0], "two-sigma", (60, 61)),
        ([2.0, 0.0, 0.0, 2.0], "worst", (0, 1)),
        # mean −4.05, deviation 22: −48 lies nearer to the best than to the outlier, and the best is worse than none
        ([1.0] * 19 + [-100.0], "two-sigma", (0, 19)),
    ],
)
def test_the_best_answer_wins_and_equal_ones_make_no_pair(rewards: list[float], rejected: str, expected: tuple[int, int] | None) -> None:
    assert pair(rewards, [True] * len(rewards), rejected) == expected


def test_an_answer_that_was_cut_off_wins_no_pair() -> None:
    assert pair([0.0, 2.0, -1.0], [True, False, True], "worst") == (0, 2)
    assert pair([0.0, 2.0, -1.0], [False, True, False], "worst") == (1, 2)
    assert pair([-3.0, -2.0], [True, False], "worst") is None
    assert pair([1.0, 0.0], [False, False], "worst") is None
