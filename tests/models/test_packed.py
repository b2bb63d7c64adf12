"""Packed rows: no sequence sees another, and all is as if each stood alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf.algorithms.language_model import next_token_loss
from rlhf.models.attention import attend
from rlhf.models.packed import SHARED, Packed, pack, pad_rows
from rlhf.models.pieces import Ragged
from rlhf.models.policy import logits_at

LENGTHS = (7, 30, 1, 12, 90, 25, 60)


def sequences(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 120) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def rows_of(packed: Packed, values: torch.Tensor) -> list[torch.Tensor]:
    """The values of each sequence, out of what was computed for the packed row (1, N, …)."""
    return [values[0, places[:length]] for places, length in zip(packed.places, packed.lengths.tolist(), strict=True)]


@torch.no_grad()
def test_no_sequence_sees_another(llama: LlamaForCausalLM) -> None:
    given = sequences((40, 30, 20))
    packed = pack(given, "cpu")
    changed = replace(packed, ids=packed.ids.clone())
    changed.ids[0, packed.places[1, :30]] = 7
    before, after = (rows_of(p, llama(**p.inputs, use_cache=False).logits) for p in (packed, changed))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


@torch.no_grad()
def test_a_common_beginning_stands_once_and_each_sequence_reads_as_if_alone(llama: LlamaForCausalLM) -> None:
    system, other, prompt, few, *answers = sequences((40, 7, 20, SHARED - 1, 12, 1, 9))
    given = [
        system + answers[0],
        few + answers[1],
        system + prompt + answers[1],  # what it shares with the next one is more
        system + prompt + answers[2],
        system,  # a sequence and its own beginning
        few + answers[2],  # begins alike with another one, but with few tokens
        system + prompt + answers[2],  # the same again
        other,
    ]
    packed = pack(given, "cpu")
    assert [(piece.length, piece.after) for piece in packed.pieces] == [
        *((40, None), (12, 0), (20, 0), (1, 2), (9, 2), (9, 2)),
        *((SHARED, None), (SHARED - 1 + 9, None), (7, None)),
    ]
    assert [packed.ids.flatten()[places[:length]].tolist() for places, length in zip(packed.places, packed.lengths, strict=True)] == given
    logits = rows_of(packed, llama(**packed.inputs, use_cache=False).logits)
    for ids, found in zip(given, logits, strict=True):
        alone = llama(torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=5e-5)
    assert packed.ids.flatten()[packed.last].tolist() == [ids[-1] for ids in given]


def test_layout_of_a_packed_row() -> None:
    given = sequences()
    packed = pack(given, "cpu")
    assert packed.ids.tolist() == [[token for ids in given for token in ids]]
    assert [piece.length for piece in packed.pieces] == list(LENGTHS)
    assert packed.positions.tolist() == [[position for length in LENGTHS for position in range(length)]]
    for ids, places, last in zip(given, packed.places, packed.last.tolist(), strict=True):
        assert packed.ids[0, places[: len(ids)]].tolist() == ids
        assert last == places[len(ids) - 1]


def test_predictions_stand_before_the_tokens_of_the_mask() -> None:
    begin = [2] * SHARED
    packed = pack([[*begin, 3, 4], [*begin, 5], [6, 7]], "cpu")
    assert packed.ids.tolist() == [[*begin, 3, 4, 5, 6, 7]]
    wanted = packed.predictions([[0] * SHARED + [1, 1], [0] * SHARED + [1], [1, 1]])
    # 3 and 5 both follow the common 2; nothing predicts the first token of a sequence
    assert wanted.places.tolist() == [SHARED - 1, SHARED, SHARED - 1, SHARED + 3]
    assert wanted.targets.tolist() == [3, 4, 5, 7]
    assert wanted.rows.tolist() == [0, 0, 1, 2]


@torch.no_grad()
def test_a_model_that_does_not_attend_piece_by_piece_fails(llama: LlamaForCausalLM) -> None:
    packed = pack(sequences((5, 3)), "cpu")
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="must match"):
        llama(**packed.inputs)


def test_loss_and_gradient_of_a_packed_row_are_those_of_single_ones(llama: LlamaForCausalLM) -> None:
    given = sequences((40, 9, 30, 2, 20, 60))
    masks = [[0, *(1 if (token + place) % 3 else 0 for place, token in enumerate(ids[1:]))] for ids in given]
    counted = sum(map(sum, masks))

    def loss_and_gradient(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        llama.zero_grad()
        total = torch.zeros(())
        for i in range(0, len(given), size):
            packed = pack(given[i : i + size], "cpu")
            wanted = packed.predictions(masks[i : i + size])
            loss = next_token_loss(logits_at(llama, packed, wanted.places), wanted.targets, counted)
            loss.backward()
            total += loss.detach()
        return total, [parameter.grad.clone() for parameter in llama.parameters() if parameter.grad is not None]

    whole = loss_and_gradient(len(given))
    assert len(whole[1]) == len(list(llama.parameters()))
    scale = max(gradient.abs().max().item() for gradient in whole[1])
    for size in (1, 4):
        torch.testing.assert_close(loss_and_gradient(size), whole, rtol=1e-5, atol=1e-5 * scale)


def test_rows_are_padded_on_the_right() -> None:
    assert pad_rows([[1, 2], [3], [4, 5, 6]], 9).tolist() == [[1, 2, 9], [3, 9, 9], [4, 5, 6]]


@pytest.mark.parametrize("asked", [{"softcap": 2.0}, {"s_aux": torch.tensor([0.5, 2.0])}, {"sliding_window": 10}])
def test_a_row_as_kernels_take_it_goes_piece_by_piece_where_a_layer_asks_for_more(asked: dict[str, Any]) -> None:
    packed = pack([*sequences((40, 12)), [*sequences((40,))[0], 3]], "cpu")
    states = torch.randn(1, 2, packed.ids.shape[1], 8)
    unfit = torch.empty(1, 1, 0, 0)
    rows = (packed.pieces, Ragged.of(packed.pieces, torch.device("cpu")))
    one, other = (attend(torch.nn.Identity(), states, states, states, unfit, row, **asked)[0] for row in rows)
    assert torch.equal(one, other)
    assert not torch.allclose(one, attend(torch.nn.Identity(), states, states, states, unfit, packed.pieces)[0])
