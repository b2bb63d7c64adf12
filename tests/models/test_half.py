"""Attention in bfloat16 on a CPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.models import half
from rlhf.models.half import BLOCK

WIDTH = 16


def tensors(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.randn(1, *shape, WIDTH, generator=generator)).bfloat16().requires_grad_() for shape in shapes]


def differences(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> list[float]:
    return [float((one.double() - other).norm().detach() / other.norm().detach()) for one, other in zip(found, right, strict=True)]


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (7, 7), (BLOCK + 3, BLOCK + 3), (2 * BLOCK, 2 * BLOCK), (5, 40), (BLOCK + 1, 3 * BLOCK)]
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_answers_and_gradients_are_as_near_as_one_rounding(heads: tuple[int, int], queries: int, keys: int) -> None:
    query, key, value = tensors((heads[0], queries), (heads[1], keys), (heads[1], keys))
    exact = [states.detach().double().requires_grad_() for states in (query, key, value)]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    right = scaled_dot_product_attention(exact[0], exact[1], exact[2], attn_mask=mask, scale=0.3, enable_gqa=True)
    found = half.attend(query, key, value, 0.3)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    of_found = torch.autograd.grad(found, (query, key, value), slope)
    of_right = torch.autograd.grad(right, exact, slope.double())
    assert found.dtype == torch.bfloat16
    assert max(differences((found,), (right,))) < 2**-8
    if keys > 1:  # of a single key there is nothing to choose: its score and its query have no gradient
        assert max(differences(of_found, of_right)) < 2**-7


def test_a_piece_that_follows_another_is_what_the_whole_is() -> None:
    query, key, value = (states.detach() for states in tensors((2, 50), (2, 50), (2, 50)))
    whole = half.attend(query, key, value, 0.25)
    torch.testing.assert_close(half.attend(query[:, :, 30:], key, value, 0.25), whole[:, :, 30:])
