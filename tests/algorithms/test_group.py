"""Critic-free advantages and losses, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.advantages import advantages, baselines, equal, overlong_penalty, returns
from rlhf.algorithms.group import Objective, corrections, group_loss, log_ratios, token_weights
from rlhf.algorithms.ppo import policy_loss, whiten

# two prompts, two answers to each, of 2, 1, 3 and 2 tokens
MASK = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
REWARDS = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
GREEDY = torch.tensor([1.0, 4.0])
KL = torch.tensor([[0.5, 0.25, 0], [1.0, 0, 0], [0.25, 0.25, 0.5], [0.0, 0.0, 0.0]])
LN2 = math.log(2)


def near(found: Tensor, expected: Tensor | list | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [[0.0, 0.0], [0.0, 0.0]]),
        ("mean", [[1.5, 1.5], [1.5, 1.5]]),
        ("leave-one-out", [[0.0, 3.0], [2.0, 1.0]]),
        # (2·3 + 1·0) / 3 and (3·1 + 2·2) / 5
        ("length-weighted", [[2.0, 2.0], [1.4, 1.4]]),
        ("greedy", [[1.0, 1.0], [4.0, 4.0]]),
    ],
)
def test_baselines(kind: str, expected: list[list[float]]) -> None:
    near(baselines(REWARDS, MASK.sum(1).view(2, 2), GREEDY, kind), expected)


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "length-weighted"])
@pytest.mark.parametrize(("scale", "epsilon"), [("none", 1e-4), ("group", 1e-9), ("batch", 1e-4)])
def test_equal_rewards_teach_nothing_whatever_their_mean_is_rounded_to(baseline: str, scale: str, epsilon: float) -> None:
    rewards = torch.tensor([0.1, 0.3, 0.7, -0.9, 2.3]).repeat_interleave(7).view(5, 7)
    mask = torch.ones(35, 3)
    how = {"baseline": baseline, "scale": scale, "epsilon": epsilon, "gamma": 1.0, "kl_where": "none", "beta": 0.0}
    found = advantages(rewards, rewards[:, 0], torch.zeros_like(mask), mask, **how)  # type: ignore[arg-type]  # of any kind
    assert not found.any()


def test_leaving_one_out_is_the_mean_scaled() -> None:
    rewards = torch.tensor([[1.0, 4.0, -2.0, 0.5]])
    near(rewards - baselines(rewards, rewards, rewards[:, 0], "leave-one-out"), 4 / 3 * (rewards - rewards.mean()))


def of(**changes: object) -> Tensor:
    values = {"baseline": "mean", "scale": "none", "epsilon": 0.0, "gamma": 1.0, "kl_where": "none", "beta": 0.1} | changes
    return advantages(REWARDS, GREEDY, KL, MASK, **values)  # type: ignore[arg-type]  # of any kind


def test_an_answers_advantage_stands_on_each_of_its_tokens() -> None:
    near(of(), [[1.5, 1.5, 0], [-1.5, 0, 0], [-0.5, -0.5, -0.5], [0.5, 0.5, 0]])
    # std of a sample of two: |difference| / √2
    std = torch.tensor([[3.0], [3.0], [1.0], [1.0]]) / math.sqrt(2)
    near(of(scale="group", epsilon=0.5), of() / (std + 0.5))
    near(of(scale="batch"), whiten(of(), MASK))


def test_where_the_kl_stands() -> None:
    # 0.1·(0.75, 1, 1, 0) off the rewards, before the baseline
    rewards = [[2.925, -0.1], [0.9, 2.0]]
    half = [(a - b) / 2 for a, b in rewards]
    near(of(kl_where="answer"), MASK * torch.tensor([half[0], -half[0], half[1], -half[1]])[:, None])
    # 0.1 of each token's off its own reward: from the last token backwards 1.5 − 0.025, then − 0.05 more
    near(of(kl_where="token")[0], [1.425, 1.475, 0])
    near(of(kl_where="token")[2], [-0.5 - 0.1, -0.5 - 0.075, -0.5 - 0.05])
    # halved at each step: −0.05 + 0.5·1.475
    near(of(kl_where="token", gamma=0.5)[0], [0.6875, 1.475, 0])
    near(of(kl_where="loss"), of())


def test_returns_are_discounted_sums() -> None:
    near(
        returns(torch.tensor([[1.0, 2.0, 4.0], [1.0, 7.0, 7.0]]), torch.tensor([[1.0, 1, 1], [1, 0, 0]]), 0.5), [[3.0, 4.0, 4.0], [1, 0, 0]]
    )


def test_groups_of_equal_rewards_tell_nothing() -> None:
    assert equal(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])).tolist() == [True, False]


def test_overlong_answers_are_punished_step_by_step() -> None:
    # L 100, the last 20 of which cost up to 1
    near(overlong_penalty(torch.tensor([10, 80, 85, 90, 100]), 100, 20, 1.0), [0.0, 0.0, -0.25, -0.5, -1.0])
    near(overlong_penalty(torch.tensor([90]), 100, 20, 3.0), [-1.5])


# -------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("normaliser", "expected"),
    [("tokens", [1 / 8] * 4), ("answers", [1 / 8, 1 / 4, 1 / 12, 1 / 8]), ("constant", [1 / 40] * 4), ("sequences", [1 / 4] * 4)],
)
def test_what_a_token_counts(normaliser: str, expected: list[float]) -> None:
    near(token_weights(MASK, normaliser, 8.0, 4.0, 10.0), MASK * torch.tensor(expected)[:, None])


OLD = torch.log(torch.tensor([[0.5, 0.25], [0.5, 1.0]])) * torch.tensor([[1.0, 1], [1, 0]])
NEW = torch.log(torch.tensor([[0.75, 0.25], [0.2, 1.0]])) * torch.tensor([[1.0, 1], [1, 0]])
BOTH = torch.tensor([[1.0, 1], [1, 0]])  # ratios 1.5, 1; and 0.4


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ("token", [[1.5, 1.0], [0.4, 1.0]]),
        ("sequence-sum", [[1.5, 1.5], [0.4, 1.0]]),
        ("sequence-mean", [[math.sqrt(1.5), math.sqrt(1.5)], [0.4, 1.0]]),
        ("sequence-token", [[math.sqrt(1.5), math.sqrt(1.5)], [0.4, 1.0]]),
    ],
)
def test_ratios(ratio: str, expected: list[list[float]]) -> None:
    near(log_ratios(NEW, OLD, BOTH, ratio).exp(), expected)


def form(**changes: object) -> Objective:
    values = {"ratio": "token", "objective": "clip", "policy_clip": (0.2, 0.3), "dual_clip": None, "ratio_cap": (0.0, 1.2)}
    kl = {"kl_coefficient": 0.0, "kl_estimator": "k3", "kl_with_ratio": False}
    return Objective(**(values | kl | changes))  # type: ignore[arg-type]  # of any kind


def loss_of(new: Tensor, advantage: Tensor, weights: Tensor | None = None, given: Tensor | None = None, **changes: object) -> Tensor:
    ones = torch.ones_like(BOTH)
    found = group_loss(
        new, OLD, OLD, advantage * BOTH, BOTH, BOTH if weights is None else weights, ones if given is None else given, form(**changes)
    )
    return found.loss


def test_clipping_up_down_and_on_both_sides() -> None:
    up, down = torch.full((2, 2), 2.0), torch.full((2, 2), -2.0)
    # 1.5 is held at 1.3 upwards; 0.4 at 0.8 downwards
    near(loss_of(NEW, up), -2 * (1.3 + 1 + 0.4))
    near(loss_of(NEW, down), 2 * (1.5 + 1 + 0.8))
    near(loss_of(NEW, down, dual_clip=1.4), 2 * (1.4 + 1 + 0.8))
    near(loss_of(NEW, up, objective="cispo"), -2 * (NEW * torch.tensor([[1.2, 1.0], [0.4, 0.0]])).sum())
    near(loss_of(NEW, up, objective="cispo", ratio_cap=(0.5, 1.2)), -2 * (NEW * torch.tensor([[1.2, 1.0], [0.5, 0.0]])).sum())


def test_on_tokens_it_is_ppos_loss() -> None:
    advantage = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    ours = group_loss(
        NEW, OLD, OLD, advantage, BOTH, token_weights(BOTH, "tokens", 3.0, 2.0, 1.0), torch.ones_like(BOTH), form(dual_clip=3.0)
    )
    theirs = policy_loss(NEW, OLD, advantage, BOTH, (0.2, 0.3), 3.0, 3.0)
    near(ours.loss, theirs.loss)
    assert {name: value.item() for name, value in ours.sums.items()} == pytest.approx({k: v.item() for k, v in theirs.sums.items()})


def slopes(**changes: object) -> Tensor:
    """d loss / d log π, an advantage of 1 on every token, where nothing is clipped."""
    new = NEW.clone().requires_grad_()
    wide = {"policy_clip": (0.9, 9.0), "ratio_cap": (0.0, 9.0)}
    loss_of(new, torch.ones(2, 2), **(wide | changes)).backward()  # type: ignore[arg-type]  # of any kind
    assert new.grad is not None
    return -new.grad


def test_gradients_of_each_ratio() -> None:
    root = math.sqrt(1.5)
    near(slopes(), [[1.5, 1.0], [0.4, 0.0]])
    # the answer's ratio stands on both of its tokens, and moves with both
    near(slopes(ratio="sequence-sum", weights=BOTH / torch.tensor([[2.0], [1.0]])), [[1.5, 1.5], [0.4, 0.0]])
    near(slopes(ratio="sequence-mean", weights=BOTH / torch.tensor([[2.0], [1.0]])), [[root / 2, root / 2], [0.4, 0.0]])
    near(slopes(ratio="sequence-token"), [[root, root], [0.4, 0.0]])
    near(slopes(objective="cispo"), [[1.5, 1.0], [0.4, 0.0]])
    # beyond its cap a token's ratio is held, and its gradient stays
    near(slopes(objective="cispo", ratio_cap=(0.0, 1.2)), [[1.2, 1.0], [0.4, 0.0]])


@pytest.mark.parametrize(
    ("estimator", "with_ratio", "expected"),
    [
        # of one token with log ratio x = ln 2 to the reference, and ratio 2 to the old policy
        ("k2", False, LN2),
        ("k3", False, 1 - 0.5),
        ("k1", True, 2 * (LN2 + 1)),
        ("k2", True, 2 * (0.5 * LN2**2 + LN2)),
        ("k3", True, 2 * (0.5 - 1 + LN2 + 0.5)),
    ],
)
def test_gradients_of_the_kl_as_a_loss(estimator: str, with_ratio: bool, expected: float) -> None:
    new, one = torch.full((1, 1), math.log(0.5)).requires_grad_(), torch.ones(1, 1)
    old = torch.full((1, 1), math.log(0.25))
    kl = form(kl_coefficient=0.1, kl_estimator=estimator, kl_with_ratio=with_ratio)
    found = group_loss(new, old, old, torch.zeros(1, 1), one, one, one, kl)
    found.loss.backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(0.1 * expected)
    assert found.loss.item() == pytest.approx(0.1 * found.sums["kl_loss"].item())


@pytest.mark.parametrize("ratio", ["token", "sequence-sum", "sequence-mean"])
def test_ratios_beyond_all_numbers_leave_finite_gradients(ratio: str) -> None:
    new = (OLD + 200 * BOTH).requires_grad_()
    kl = {"kl_coefficient": 0.1, "kl_estimator": "k3", "kl_with_ratio": True}
    loss = group_loss(
        new, OLD, OLD + 500, torch.tensor([[1.0], [-1.0]]) * BOTH, BOTH, BOTH, torch.ones_like(BOTH), form(ratio=ratio, **kl)
    ).loss
    loss.backward()
    assert new.grad is not None
    assert loss.isfinite()
    assert new.grad.isfinite().all()


def test_corrections_of_another_sampler() -> None:
    weights = torch.tensor([[4.0, 0.25], [0.4, 1.0]])
    rollout = OLD - weights.log()
    for kind, expected in {
        "none": [[1.0, 1.0], [1.0, 1.0]],
        "tis": [[2.0, 0.5], [0.5, 1.0]],
        "icepop": [[0.0, 0.0], [0.0, 1.0]],
        # geometric means 1 and 0.4
        "sequence": [[1.0, 1.0], [0.0, 0.0]],
    }.items():
        near(corrections(OLD, rollout, BOTH, kind, 0.5, 2.0), expected)
    near(corrections(OLD, rollout, BOTH, "icepop", 0.3, 5.0), [[4.0, 0.0], [0.4, 1.0]])
    near(loss_of(OLD, torch.ones(2, 2), given=corrections(OLD, rollout, BOTH, "tis", 0.5, 2.0)), -(2.0 + 0.5 + 0.5))


def test_a_token_that_the_sampler_thought_next_to_impossible_is_left_out() -> None:
    found = corrections(torch.tensor([[-0.1, -0.5]]), torch.tensor([[-100.0, -0.5]]), torch.ones(1, 2), "icepop", 0.5, 5.0)
    near(found, [[0.0, 1.0]])
