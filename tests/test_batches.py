"""Encoding of dialogues, packing, and the order of rows."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.algorithms.language_model import next_token_loss
from rlhf.data.batches import SHARED, Order, Packed, blocks, decode_answer, encode_dialogue, encode_dialogues, encode_prompt, pack, pad_rows
from rlhf.data.sandbox import make_rows
from rlhf.models.policy import logits_at
from rlhf.models.tokenizer import template

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is the opposite of hot?"}
ANSWER = {"role": "assistant", "content": "The opposite of hot is cold."}
AGAIN = {"role": "user", "content": "Thanks! And of big?"}
LAST = {"role": "assistant", "content": " small — 小さい 🙂"}

# ------------------------------------------------------------------------------------------------------------------ dialogues

ROWS = make_rows("pairs", 60, 1, 0.0)
RENDERED = {
    "special": (
        "<|system|>Be brief.<|user|>What is the opposite of hot?<|assistant|>The opposite of hot is cold.<|end|>"
        "<|user|>Thanks! And of big?<|assistant|> small — 小さい 🙂<|end|>"
    ),
    "turns": (
        "Be brief.\n\nHuman: What is the opposite of hot?\n\nAssistant: The opposite of hot is cold.<|end|>"
        "\n\nHuman: Thanks! And of big?\n\nAssistant:  small — 小さい 🙂<|end|>"
    ),
}
COUNTED = {
    "special": ["The opposite of hot is cold.<|end|>", " small — 小さい 🙂<|end|>"],
    "turns": [" The opposite of hot is cold.<|end|>", "  small — 小さい 🙂<|end|>"],
}


@pytest.fixture(params=["special", "turns"])
def templated(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gives the tokenizer one of the chat templates for the time of a test."""
    monkeypatch.setattr(tokenizer, "chat_template", template(request.param))
    return request.param


def spans(mask: list[int]) -> list[slice]:
    """Where the mask is 1, run by run."""
    edges = [i for i in range(len(mask) + 1) if ([0, *mask, 0][i]) != ([0, *mask, 0][i + 1])]
    return [slice(first, end) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def test_the_mask_covers_the_assistants_tokens_and_end_tokens_alone(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = encode_dialogue(tokenizer, [SYSTEM, USER, ANSWER, AGAIN, LAST])
    assert tokenizer.decode(ids) == RENDERED[templated]
    assert [tokenizer.decode(ids[span]) for span in spans(mask)] == COUNTED[templated]
    assert [ids[span][-1] for span in spans(mask)] == [tokenizer.eos_token_id] * 2


def test_a_prompt_is_the_beginning_of_its_dialogue(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt, answer in (([USER], ANSWER), ([SYSTEM, USER], ANSWER), ([USER, ANSWER, AGAIN], LAST)):
        asked = encode_prompt(tokenizer, prompt)
        ids, mask = encode_dialogue(tokenizer, [*prompt, answer])
        assert ids[: len(asked)] == asked
        assert mask[len(asked) :] == [1] * (len(ids) - len(asked))
        assert mask[len(asked) - 1] == 0
        assert decode_answer(tokenizer, ids[len(asked) :]) == answer["content"].strip()


def test_a_template_that_rewrites_earlier_turns_counts_the_last_answer_only(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as templates do that drop the thoughts of earlier turns
    rewriting = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role == 'user' else '…' }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    ids, mask = encode_dialogue(tokenizer, [USER, ANSWER, AGAIN, LAST])
    assert (
        tokenizer.decode(ids)
        == f"<|user|>{USER['content']}<|assistant|>…<|end|><|user|>{AGAIN['content']}<|assistant|>{LAST['content']}<|end|>"
    )
    assert [tokenizer.decode(ids[span]) for span in spans(mask)] == [LAST["content"] + "<|end|>"]
    asked = encode_prompt(tokenizer, [USER, ANSWER, AGAIN])
    assert ids[: len(asked)] == asked


def test_many_dialogues_at_once_are_the_same_ids_as_each_alone(templated: str, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [[*row["prompt"], {"role": "assistant", "content": row[side]}] for row in ROWS for side in ("chosen", "rejected")]
    dialogues = [*pairs, [USER], [SYSTEM, USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER, AGAIN, LAST], [USER]]
    together = encode_dialogues(tokenizer, dialogues)
    assert together == [encode_dialogue(tokenizer, dialogue) for dialogue in dialogues]
    # by hand: each piece of the rendered text tokenized for itself
    for dialogue, (ids, mask) in zip(pairs, together, strict=False):
        before = str(tokenizer.apply_chat_template(dialogue[:-1], tokenize=False, add_generation_prompt=True))
        answer = str(tokenizer.apply_chat_template(dialogue, tokenize=False))[len(before) :].rstrip()
        prompt, said = tokenizer.encode(before), tokenizer.encode(answer)
        if len(dialogue) == 2:
            assert (ids, mask) == (prompt + said, [0] * len(prompt) + [1] * len(said))
    assert encode_dialogues(tokenizer, []) == []


# -------------------------------------------------------------------------------------------------------------------- packing

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


# ------------------------------------------------------------------------------------------------------------ order, passages


def test_each_epoch_is_a_fresh_permutation() -> None:
    order = Order(rows=10, batch_size=4, seed=1)
    assert order.steps(2) == 5
    rows = [row for step in range(order.steps(2)) for row in order.batch(step)]
    epochs = rows[:10], rows[10:]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(10))


def test_the_order_is_a_function_of_seed_and_step() -> None:
    rows = {seed: [Order(10, 4, seed).batch(step) for step in range(5)] for seed in (1, 2)}
    assert rows[1] != rows[2]
    assert [Order(10, 4, 1).batch(step) for step in (4, 0, 2)] == [rows[1][step] for step in (4, 0, 2)]


def test_a_batch_larger_than_the_data_goes_through_several_epochs() -> None:
    assert Counter(Order(3, 7, 1).batch(0)) == Counter(dict.fromkeys(range(3), 2)) + Counter(Order(3, 7, 1).batch(0)[6:])
    assert Order(3, 7, 1).steps(1) == 1


LENGTHS_OF_ROWS = [random.Random(row).randrange(5, 300) for row in range(1003)]


def test_rows_of_similar_length_share_a_batch() -> None:
    def spreads(order: Order) -> list[int]:
        batches = [[LENGTHS_OF_ROWS[row] for row in order.batch(step)] for step in range(250)]
        return [max(batch) - min(batch) for batch in batches]

    plain, grouped = (Order(1003, 8, 1, lengths) for lengths in (None, LENGTHS_OF_ROWS))
    # 1003 rows are 125 batches and 3 rows: the batch that goes on into the next epoch is not sorted
    inside = [spread for step, spread in enumerate(spreads(grouped)) if step != 125]
    assert statistics.fmean(inside) < 15
    assert statistics.fmean(spreads(plain)) > 200
    # the batches do not come in order of length
    firsts = [LENGTHS_OF_ROWS[grouped.batch(step)[0]] for step in range(12)]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


@pytest.mark.parametrize("rows", [1, 7, 8, 24, 103])
def test_grouped_by_length_each_row_comes_once_an_epoch(rows: int) -> None:
    order = Order(rows, 8, 1, LENGTHS_OF_ROWS[:rows])
    stream = [row for step in range(2 * rows) for row in order.batch(step)]
    epochs = [stream[i : i + rows] for i in range(0, len(stream), rows)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(rows))] * 16


def test_grouped_by_length_each_epoch_has_other_batches() -> None:
    order = Order(104, 8, 1, LENGTHS_OF_ROWS[:104])
    epochs = [{frozenset(order.batch(step)) for step in range(first, first + 13)} for first in (0, 13, 26)]
    assert epochs[0].isdisjoint(epochs[1])
    assert epochs[1].isdisjoint(epochs[2])


def test_the_grouped_order_is_a_function_of_seed_and_step() -> None:
    def steps(seed: int, numbers: list[int]) -> list[list[int]]:
        order = Order(103, 8, seed, LENGTHS_OF_ROWS)
        return [order.batch(number) for number in numbers]

    assert steps(1, [30, 2, 14]) == [steps(1, list(range(31)))[number] for number in (30, 2, 14)]
    assert steps(1, [0, 1, 2]) != steps(2, [0, 1, 2])


def test_passages_follow_each_other_in_rows_of_one_width(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["What is the capital of France?", "The opposite of hot is cold.", "One more."]
    rows = blocks(texts, tokenizer, 5)
    assert {len(row) for row in rows} == {5}
    stream = "<|end|>".join(texts) + "<|end|>"
    ids = tokenizer.encode(stream)
    assert [token for row in rows for token in row] == ids[: len(ids) // 5 * 5]
    assert blocks(texts[2:], tokenizer, 100) == []
