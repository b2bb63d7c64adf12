"""Losses, rewards, advantages and the KL controller against numbers worked out by hand; and no sum depends on how a batch is cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.algorithms import ppo
from rlhf.algorithms.language_model import next_token_loss
from rlhf.algorithms.pairwise import pairwise_loss

LN2, LN3 = math.log(2), math.log(3)


def near(actual: Tensor, expected: list | float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- language model, pairs


def test_next_token_loss() -> None:
    probabilities, targets = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([1, 0])
    near(next_token_loss(probabilities.log(), targets, 4.0), (math.log(4 / 3) + LN2) / 4)


def test_pairwise_loss() -> None:
    loss, sums = pairwise_loss(torch.tensor([1.0 + LN3, 0.0, 2.0]), torch.tensor([1.0, LN3, 2.0]), 4.0)
    # σ(ln 3) = 3/4, σ(−ln 3) = 1/4, σ(0) = 1/2
    near(loss, (math.log(4 / 3) + math.log(4) + LN2) / 4)
    # a tie is no success
    assert sums["accuracy"] == 1
    near(sums["margin"], 0.0)
    near(sums["chosen_score"], 3 + LN3)
    near(sums["rejected_score"], 3 + LN3)


# ------------------------------------------------------------------------------------------------------------ rewards and KL


@pytest.mark.parametrize(("estimator", "value"), [("k1", LN2), ("k2", 0.5 * LN2**2), ("k3", 0.5 - 1 + LN2)])
def test_kl_estimators(estimator: str, value: float) -> None:
    near(ppo.kl_estimate(torch.tensor([[math.log(0.4)]]), torch.tensor([[math.log(0.2)]]), estimator), [[value]])


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    kl = 0.5 * math.log(2.5) + 0.3 * math.log(0.6) + 0.2 * math.log(2 / 3)
    for estimator in ("k1", "k3"):
        near((policy * ppo.kl_estimate(policy.log(), reference.log(), estimator)).sum(), kl)
    assert (ppo.kl_estimate(policy.log(), reference.log(), "k1") < 0).any()
    assert (ppo.kl_estimate(policy.log(), reference.log(), "k3") >= 0).all()


def test_k3_of_tokens_far_from_the_reference_is_finite_and_still_pulls() -> None:
    differences = torch.tensor([[9.0, 10.0, 12.0, 1000.0, -1000.0]])  # log π_ref − log π
    log_probs = (-differences).requires_grad_()
    found = ppo.kl_estimate(log_probs, torch.zeros(1, 5), "k3")
    largest = math.exp(10)
    near(found / largest, [[(math.exp(9) - 10) / largest, 1 - 11 / largest, 3 - 13 / largest, 991 - 1001 / largest, 999 / largest]])
    found.sum().backward()
    assert log_probs.grad is not None
    near(log_probs.grad / largest, [[(1 - math.exp(9)) / largest, *[1 / largest - 1] * 3, 1 / largest]])


def test_a_ratio_beyond_all_numbers_leaves_finite_gradients() -> None:
    for advantage in (1.0, -1.0):
        new = torch.tensor([[200.0]]).requires_grad_()  # e²⁰⁰ is infinite in fp32, and 0 × ∞ no number
        ppo.policy_loss(new, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), (0.2, 0.2), None, 1.0).loss.backward()
        assert new.grad is not None
        assert new.grad.item() == pytest.approx(0 if advantage > 0 else math.exp(10))


def test_token_rewards_pay_the_score_at_each_answers_own_end() -> None:
    kl, mask = torch.tensor([[0.1, 0.2, 9.0], [0.3, 0.4, 0.5]]), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    near(ppo.token_rewards(kl, torch.tensor([1.0, -1.0]), mask, 0.5), [[-0.05, 0.9, 0.0], [-0.15, -0.2, -1.25]])


def test_an_answer_of_one_token_bears_its_whole_reward() -> None:
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    rewards = ppo.token_rewards(torch.tensor([[0.5, 7.0], [0.5, 0.5]]), torch.tensor([2.0, 3.0]), mask, 1.0)
    near(rewards, [[1.5, 0.0], [-0.5, 2.5]])
    near(ppo.gae(rewards, torch.tensor([[1.0, 8.0], [0.0, 0.0]]), mask, 0.5, 0.0)[0], [[0.5, 0.0], [-0.5, 2.5]])


def test_kl_controller_follows_the_target_by_bounded_steps() -> None:
    controller = ppo.KlController(beta=0.1, adaptive=True, target=6.0, horizon=1000)
    controller.update(60.0, 50)  # ten times the target: the error is cut to 0.2
    assert controller.beta == pytest.approx(0.1 * 1.01)
    controller.update(5.4, 50)  # 10% below
    assert controller.beta == pytest.approx(0.1 * 1.01 * 0.995)
    controller.update(0.0, 1000)
    assert controller.beta == pytest.approx(0.1 * 1.01 * 0.995 * 0.8)


def test_fixed_kl_controller_stays() -> None:
    controller = ppo.KlController(beta=0.1, adaptive=False, target=6.0, horizon=1000)
    controller.update(60.0, 50)
    assert controller.beta == 0.1


# ---------------------------------------------------------------------------------------------------------------- advantages


def test_gae() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 99.0]])  # 99 stands beyond the second answer's end
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
    # first: δ = 1.4, 2.35, 1.5 and γλ = 0.72; second: δ = 1.4, 1
    near(advantages, [[1.4 + 0.72 * (2.35 + 0.72 * 1.5), 2.35 + 0.72 * 1.5, 1.5], [1.4 + 0.72 * 1.0, 1.0, 0.0]])
    near(returns, [[4.3696, 4.43, 3.0], [2.62, 2.0, 0.0]])


def test_gae_with_lambda_1_returns_what_is_still_to_come_and_with_lambda_0_looks_one_step_ahead() -> None:
    rewards, values, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, 3.0, 1.0]]), torch.ones(1, 3)
    near(ppo.gae(rewards, values, mask, 1.0, 1.0)[1], [[7.0, 6.0, 4.0]])
    near(ppo.gae(rewards, values, mask, 1.0, 0.0)[0], [[1.0 + 3 - 5, 2.0 + 1 - 3, 4.0 - 1]])


def test_whitening() -> None:
    advantages, mask = torch.tensor([[1.0, 3.0], [5.0, 77.0]]), torch.tensor([[1.0, 1], [1, 0]])
    std = math.sqrt(8 / 3)
    near(ppo.whiten(advantages, mask), [[-2 / std, 0.0], [2 / std, 0.0]])


# -------------------------------------------------------------------------------------------------------------------- losses


def test_policy_loss_cuts_what_would_move_further_and_keeps_what_moves_back() -> None:
    # ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, −1, 1, −1; the last column is no answer token
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 3.0]])
    old = torch.full((1, 5), -1.0)
    log_probs = (old + ratios.log()).requires_grad_()
    advantages, mask = torch.tensor([[1.0, -1, 1, -1, 9]]), torch.tensor([[1.0, 1, 1, 1, 0]])
    found = ppo.policy_loss(log_probs, old, advantages, mask, (0.2, 0.2), None, 4.0)
    near(found.loss.detach(), (-1.2 + 1.5 - 0.5 + 0.8) / 4)
    assert found.sums["clip_fraction"] == 2
    near(found.sums["approx_kl"], 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 + LN2))
    found.loss.backward()
    # d ratio / d log p = ratio; nothing where the cut holds
    assert log_probs.grad is not None
    near(log_probs.grad, [[0.0, 1.5 / 4, -0.5 / 4, 0.0, 0.0]])


def test_policy_clip_may_be_wider_upwards_and_bound_bad_tokens() -> None:
    ratios = torch.tensor([[1.25, 1.5, 10.0]])
    old = torch.full((1, 3), -1.0)
    advantages, mask = torch.tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3)
    # 1.25 is inside 1 + 0.3, 1.5 is cut to 1.3, 10 with a negative advantage to 3
    near(ppo.policy_loss(old + ratios.log(), old, advantages, mask, (0.2, 0.3), 3.0, 1.0).loss, -1.25 - 1.3 + 3.0)
    near(ppo.policy_loss(old + ratios.log(), old, advantages, mask, (0.2, 0.3), None, 1.0).loss, -1.25 - 1.3 + 10.0)


def test_no_gradient_where_the_dual_clip_bounds_the_loss() -> None:
    log_probs = torch.tensor([[math.log(10.0), math.log(2.0)]], requires_grad=True)
    old, mask = torch.zeros(1, 2), torch.ones(1, 2)
    found = ppo.policy_loss(log_probs, old, torch.tensor([[-1.0, -1.0]]), mask, (0.2, 0.2), 3.0, 2.0)
    found.loss.backward()
    near(found.loss.detach(), (3.0 + 2.0) / 2)
    assert log_probs.grad is not None
    near(log_probs.grad, [[0.0, 1.0]])


def test_value_loss_takes_the_worse_of_the_cut_and_the_uncut() -> None:
    values, old, returns = torch.tensor([[2.0, 1.1, 0.0, 7.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[3.0, 0.0, 3.0, 0.0]])
    found = ppo.value_loss(values, old, returns, torch.tensor([[1.0, 1, 1, 0]]), 0.2, 3.0)
    # 2 is cut to 1.2, which is worse; 1.1 is inside; 0 is cut to 0.8, but the uncut error is the worse one
    near(found.loss, 0.5 * (1.8**2 + 1.1**2 + 3.0**2) / 3)
    assert found.sums["value_clip_fraction"] == 1
    near(ppo.value_loss(values, old, returns, torch.tensor([[1.0, 1, 1, 0]]), None, 3.0).loss, 0.5 * (1.0 + 1.1**2 + 3.0**2) / 3)


# ---------------------------------------------------------------------------------------------- however the batch is cut up

Loss = Callable[[Tensor, slice], Tensor]
GENERATOR = torch.Generator().manual_seed(1)
ROWS, TOKENS, VOCABULARY = 6, 5, 7
MASK = (torch.rand(ROWS, TOKENS, generator=GENERATOR) < 0.6).float()
MASK[:, 0] = 1
IDS = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=GENERATOR)
OLD, OTHER = torch.randn(2, ROWS, TOKENS, generator=GENERATOR)
COUNTED = MASK.sum().item()

LOSSES: dict[str, tuple[tuple[int, ...], Loss]] = {
    "next token": (
        (ROWS, TOKENS, VOCABULARY),
        lambda x, at: next_token_loss(x[at][MASK[at].bool()], IDS[at][MASK[at].bool()], COUNTED),
    ),
    "pairs": ((ROWS, 2), lambda x, at: pairwise_loss(x[at, 0], x[at, 1], ROWS)[0]),
    "policy": ((ROWS, TOKENS), lambda x, at: ppo.policy_loss(x[at], OLD[at], OTHER[at], MASK[at], (0.2, 0.2), None, COUNTED).loss),
    "value": ((ROWS, TOKENS), lambda x, at: ppo.value_loss(x[at], OLD[at], OTHER[at], MASK[at], 0.2, COUNTED).loss),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_do_not_depend_on_how_the_batch_is_cut(name: str) -> None:
    shape, loss = LOSSES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    def whole_and_gradient(cuts: list[slice]) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        total = sum((loss(leaf, at) for at in cuts), torch.zeros(()))
        total.backward()
        assert leaf.grad is not None
        return total.detach(), leaf.grad

    whole, gradient = whole_and_gradient([slice(0, ROWS)])
    assert gradient.abs().max() > 0
    for size in (1, 4):
        torch.testing.assert_close(whole_and_gradient([slice(i, i + size) for i in range(0, ROWS, size)]), (whole, gradient))
