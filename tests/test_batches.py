"""Encoding of dialogues, packing, and the order of rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.algorithms.language_model import next_token_loss
from rlhf.data.batches import Order, Packed, blocks, decode_answer, encode_dialogue, encode_prompt, pack, pad_rows
from rlhf.models.tokenizer import template

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is the opposite of hot?"}
ANSWER = {"role": "assistant", "content": "The opposite of hot is cold."}
AGAIN = {"role": "user", "content": "Thanks! And of big?"}
LAST = {"role": "assistant", "content": " small — 小さい 🙂"}

# ------------------------------------------------------------------------------------------------------------------ dialogues

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


# -------------------------------------------------------------------------------------------------------------------- packing

TINY = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**TINY, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": TINY,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "phi3": {**GROUPED, "pad_token_id": 0},
}
LENGTHS = (7, 30, 1, 12, 90, 25, 60)


def sequences(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 120) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()


def rows_of(packed: Packed, values: torch.Tensor) -> list[torch.Tensor]:
    """The values of each sequence, out of what was computed for the packed rows (R, C, …)."""
    flat = values.flatten(0, 1)
    return [flat[start : start + length] for start, length in zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_give_the_logits_of_each_alone(family: str) -> None:
    model, given = tiny(family), sequences()
    packed = pack(given, 0, "cpu")
    assert len(packed.ids) < len(given)
    for ids, logits in zip(given, rows_of(packed, model(**packed.inputs, use_cache=False).logits), strict=True):
        torch.testing.assert_close(logits, model(input_ids=torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_sequence_sees_another(llama: LlamaForCausalLM) -> None:
    given = sequences((40, 30, 20))
    packed = pack(given, 0, "cpu")
    assert len(packed.ids) == 1
    changed = Packed(packed.ids.clone(), packed.positions, packed.segments, packed.starts, packed.lengths)
    first = packed.starts[1].item()
    changed.ids[0, first : first + 30] = 7
    before, after = (rows_of(p, llama(**p.inputs, use_cache=False).logits) for p in (packed, changed))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_layout_of_packed_rows() -> None:
    given = sequences()
    packed = pack(given, 0, "cpu")
    flat, segments, positions = packed.ids.flatten(), packed.segments.flatten(), packed.positions.flatten()
    for number, ids in enumerate(given):
        (places,) = (segments == number).nonzero(as_tuple=True)
        assert flat[places].tolist() == ids
        assert positions[places].tolist() == list(range(len(ids)))
        assert (places[0].item(), places[-1].item()) == (packed.starts[number].item(), packed.last[number].item())
    assert (flat[segments == -1] == 0).all()
    # 225 tokens in rows of 128 need two rows
    assert packed.ids.shape == (2, 128)
    assert pack(sequences((5, 3)), 0, "cpu").ids.shape == (1, 8)
    assert pack(sequences((200, 3)), 0, "cpu").ids.shape == (2, 200)


def test_values_are_spread_over_the_tokens_of_their_sequences() -> None:
    given = sequences()
    packed = pack(given, 0, "cpu")
    spread = packed.spread([[1000 * number + place for place in range(len(ids))] for number, ids in enumerate(given)])
    assert [row.tolist() for row in rows_of(packed, spread)] == [
        [1000 * n + place for place in range(len(ids))] for n, ids in enumerate(given)
    ]
    assert (spread[packed.segments == -1] == 0).all()


def test_loss_and_gradient_of_packed_rows_are_those_of_single_ones(llama: LlamaForCausalLM) -> None:
    given = sequences((40, 9, 30, 2, 20, 60))
    masks = [[0, *(1 if (token + place) % 3 else 0 for place, token in enumerate(ids[1:]))] for ids in given]
    counted = sum(map(sum, masks))

    def loss_and_gradient(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        llama.zero_grad()
        total = torch.zeros(())
        for i in range(0, len(given), size):
            packed = pack(given[i : i + size], 0, "cpu")
            logits = llama(**packed.inputs, use_cache=False).logits
            loss = next_token_loss(logits, packed.ids, packed.spread(masks[i : i + size]), counted)
            loss.backward()
            total += loss.detach()
        return total, [parameter.grad.clone() for parameter in llama.parameters() if parameter.grad is not None]

    whole = loss_and_gradient(len(given))
    assert len(whole[1]) == len(list(llama.parameters()))
    scale = max(gradient.abs().max().item() for gradient in whole[1])
    for size in (1, 4):
        torch.testing.assert_close(loss_and_gradient(size), whole, rtol=1e-5, atol=1e-5 * scale)


def test_rows_are_padded_on_the_right() -> None:
    assert pad_rows([[1, 2], [3], [4, 5, 6]], 9, "cpu").tolist() == [[1, 2, 9], [3, 9, 9], [4, 5, 6]]


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


def test_passages_follow_each_other_in_rows_of_one_width(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["What is the capital of France?", "The opposite of hot is cold.", "One more."]
    rows = blocks(texts, tokenizer, 5)
    assert {len(row) for row in rows} == {5}
    stream = "<|end|>".join(texts) + "<|end|>"
    ids = tokenizer.encode(stream)
    assert [token for row in rows for token in row] == ids[: len(ids) // 5 * 5]
    assert blocks(texts[2:], tokenizer, 100) == []
