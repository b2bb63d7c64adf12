"""Generation against transformers' own, against a full forward pass, and against the probabilities that it should follow."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models.options import Options
from rlhf.rollout.cache import SlotCache, attend
from rlhf.rollout.decoding import size_for
from rlhf.rollout.generate import READ, Rollouts, generate
from rlhf.rollout.gpu import attend_with_options
from rlhf.rollout.sampling import Sampling, drawn, sample

PROMPTS = [[11, 12, 13, 14, 15], [21], [31, 32, 33, 34, 35, 36, 37, 38, 39], [41, 42]]
SEEDS = [1, 2, 3, 4]
LIMIT = 24
PAD, NO_TOKEN = 0, -1  # NO_TOKEN as the end: no answer ends by itself
GREEDY = Sampling(0.0, 0, 1.0, LIMIT)
DRAWN = Sampling(1.0, 0, 1.0, LIMIT)


def answer(model: LlamaForCausalLM, sampling: Sampling, rows: list[int] | None = None, eos_id: int = NO_TOKEN) -> Rollouts:
    """Answers to some of the prompts."""
    rows = list(range(len(PROMPTS))) if rows is None else rows
    return generate(model, [PROMPTS[i] for i in rows], [SEEDS[i] for i in rows], sampling, eos_id=eos_id, pad_id=PAD, slots=4)


# ------------------------------------------------------------------------------------------------------ against transformers


def test_greedy_answers_are_those_of_transformers(llama: LlamaForCausalLM) -> None:
    found = answer(llama, GREEDY)
    assert len({token for tokens in found.answers for token in tokens}) > 10
    for prompt, tokens in zip(PROMPTS, found.answers, strict=True):
        made = cast(Any, llama).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LIMIT, eos_token_id=None, pad_token_id=PAD)
        assert made[0, len(prompt) :].tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_a_full_forward_pass_at_the_temperature(llama: LlamaForCausalLM, temperature: float) -> None:
    # top-k and top-p narrow what is drawn; the log-probabilities stay those of the whole distribution, as training computes them
    found = answer(llama, Sampling(temperature, 20, 0.9, LIMIT))
    for prompt, tokens, log_probs in zip(PROMPTS, found.answers, found.log_probs, strict=True):
        logits = llama(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)[torch.arange(LIMIT), tokens]
        torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=1e-4, atol=1e-4)


def test_greedy_log_probs_are_those_of_the_model(llama: LlamaForCausalLM) -> None:
    found = answer(llama, GREEDY, [0])
    with torch.no_grad():
        logits = llama(torch.tensor([PROMPTS[0] + found.answers[0]])).logits[0, len(PROMPTS[0]) - 1 : -1]
    torch.testing.assert_close(torch.tensor(found.log_probs[0]), logits.log_softmax(-1).max(-1).values, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- neighbours


def test_an_answer_depends_on_its_seed_and_not_on_its_neighbours(llama: LlamaForCausalLM) -> None:
    together = answer(llama, DRAWN)
    for row in range(len(PROMPTS)):
        assert answer(llama, DRAWN, [row]).answers == [together.answers[row]]
    assert answer(llama, DRAWN, [3, 1]).answers == [together.answers[3], together.answers[1]]
    other = generate(llama, [PROMPTS[0]], [99], DRAWN, eos_id=NO_TOKEN, pad_id=PAD, slots=1)
    assert other.answers[0] != together.answers[0]


def test_answers_end_with_the_end_token_and_leave_the_batch(llama: LlamaForCausalLM) -> None:
    free = answer(llama, DRAWN)
    # an end token that the first answer draws, and some other answer does not
    eos_id = next(token for token in free.answers[0] if any(token not in tokens for tokens in free.answers))
    sizes: list[int] = []
    hook = llama.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
    found = answer(llama, DRAWN, eos_id=eos_id)
    hook.remove()
    cut = [tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens for tokens in free.answers]
    assert found.answers == cut
    assert found.ended == [tokens[-1] == eos_id for tokens in cut]
    assert True in found.ended
    assert [len(log_probs) for log_probs in found.log_probs] == [len(tokens) for tokens in cut]
    # the prompts are read in one row; after that each forward pass has the rows that are still going
    assert sizes == [1, *(sum(len(tokens) > step for tokens in cut) for step in range(1, max(map(len, cut))))]
    assert sizes[-1] < len(PROMPTS)


def test_an_answer_that_is_cut_off_has_not_ended(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    found = answer(llama, Sampling(1.0, 0, 1.0, 2), eos_id=tokenizer.eos_token_id)
    assert [len(tokens) for tokens in found.answers] == [2] * 4
    assert found.ended == [False] * 4
    assert found.prompts == PROMPTS


def test_tokens_of_the_first_prompt_are_told_as_they_come(llama: LlamaForCausalLM) -> None:
    told: list[int] = []

    def tell(number: int, answer: list[int]) -> bool:
        if number == 0:
            told.append(answer[-1])
        return False

    found = generate(llama, PROMPTS, SEEDS, DRAWN, eos_id=NO_TOKEN, pad_id=PAD, slots=2, policy_version=7, stop=tell)
    assert told == found.answers[0]
    assert found.policy_version == 7


def test_generation_leaves_the_model_in_its_mode(llama: LlamaForCausalLM) -> None:
    for training in (True, False):
        llama.train(training)
        answer(llama, GREEDY, [0])
        assert llama.training is training


def test_prompts_of_many_lengths_take_few_programs(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, product = set[int](), torch.ops.mkldnn._linear_pointwise

    def counted(inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.add(inputs.shape[:-1].numel())
        return product(inputs, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    monkeypatch.setitem(READ, "cpu", 1)
    prompts = [[length] * length for length in range(65, 101)]
    generate(llama, prompts, range(len(prompts)), Sampling(1.0, 0, 1.0, 2), eos_id=NO_TOKEN, pad_id=PAD, slots=3)
    assert rows == {1, 3, 128}  # of the last layer; of the slots in use; of prompts


def test_a_captured_step_is_of_as_many_slots_as_are_in_use_or_some_more() -> None:
    assert [size_for(count, 64) for count in (64, 17, 16, 5, 4, 2, 1)] == [64, 64, 16, 16, 4, 4, 1]
    assert [size_for(count, 10) for count in (10, 4, 3, 2, 1)] == [10, 10, 3, 3, 1]


# ------------------------------------------------------------------------------------------------------------------- sampling

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.15, 0.3])


def frequencies(sampling: Sampling, draws: int = 20_000) -> torch.Tensor:
    """How often each token comes for evenly spread uniform numbers: exact up to one draw."""
    uniforms = (torch.arange(draws) + 0.5) / draws
    tokens, log_probs = sample(PROBABILITIES.log().expand(draws, -1), uniforms, sampling)
    if sampling.temperature:
        expected = (PROBABILITIES.log() / sampling.temperature).log_softmax(-1)
        torch.testing.assert_close(log_probs, expected[tokens])
    return torch.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, 0, 1.0, 1), [0.05, 0.4, 0.1, 0.15, 0.3]),
        (Sampling(1.0, 2, 1.0, 1), [0, 4 / 7, 0, 0, 3 / 7]),
        # 0.4 + 0.3 falls short of 0.75: the token that crosses the bound belongs to the nucleus
        (Sampling(1.0, 0, 0.75, 1), [0, 0.4 / 0.85, 0, 0.15 / 0.85, 0.3 / 0.85]),
        (Sampling(1.0, 0, 0.1, 1), [0.0, 1.0, 0.0, 0.0, 0.0]),
        (Sampling(1.0, 2, 0.75, 1), [0, 4 / 7, 0, 0, 3 / 7]),
        # squared: 25, 1600, 100, 225, 900 of 2850
        (Sampling(0.5, 0, 1.0, 1), [25 / 2850, 1600 / 2850, 100 / 2850, 225 / 2850, 900 / 2850]),
        (Sampling(0.0, 0, 1.0, 1), [0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_frequencies_follow_the_probabilities(sampling: Sampling, expected: list[float]) -> None:
    torch.testing.assert_close(frequencies(sampling), torch.tensor(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("top_k", "top_p", "left"), [(0, 1.0, 1.0), (2, 1.0, 0.7), (0, 0.75, 0.85), (2, 0.75, 0.7)])
def test_the_log_probability_is_that_of_what_is_left_where_it_is_wanted(top_k: int, top_p: float, left: float) -> None:
    rows = PROBABILITIES.log().expand(20, -1)
    uniforms = (torch.arange(20) + 0.5) / 20
    of_all = sample(rows, uniforms, Sampling(1.0, top_k, top_p, 1))
    tokens, log_probs = sample(rows, uniforms, Sampling(1.0, top_k, top_p, 1, of_what_is_left=True))
    assert torch.equal(tokens, of_all[0])
    torch.testing.assert_close(of_all[1], PROBABILITIES.log()[tokens])
    torch.testing.assert_close(log_probs, (PROBABILITIES[tokens] / left).log())


@pytest.mark.parametrize("size", [100, 128, 1000, 4096])
def test_a_token_is_drawn_where_the_cumulative_probability_passes_the_uniform_number(size: int) -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(500, size)
    uniforms = torch.rand(500)
    tokens, _ = sample(logits, uniforms, Sampling(1.0, 0, 1.0, 1))
    upto = logits.double().softmax(-1).cumsum(-1)
    assert ((upto.gather(1, tokens[:, None]).squeeze(1) - uniforms) > -1e-6).all()
    before = upto.gather(1, (tokens - 1).clamp(min=0)[:, None]).squeeze(1).masked_fill(tokens == 0, 0)
    assert ((before - uniforms) < 1e-6).all()
    assert len(tokens.unique()) > 60


def test_extreme_uniform_numbers_draw_a_token_that_can_come() -> None:
    logits = torch.tensor([[0.0, -float("inf"), 0.0]]).expand(2, -1)
    tokens, _ = sample(logits, torch.tensor([0.0, 1 - 2**-24]), Sampling(1.0, 0, 1.0, 1))
    assert tokens.tolist() == [0, 2]
    tokens, _ = sample(logits, torch.tensor([0.0, 1 - 2**-24]), Sampling(1.0, 1, 1.0, 1))
    assert tokens.tolist() == [0, 0]


def by_sorting(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Tokens from all columns put into order, of those alike the first one first."""
    chances, order = (logits.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    chances[:, sampling.top_k or chances.shape[1] :] = 0
    if sampling.top_p < 1:
        chances = chances.masked_fill(chances.cumsum(-1) - chances >= sampling.top_p, 0)
    return order.gather(1, drawn(chances, uniforms)).squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in which many logits are alike
@pytest.mark.parametrize("columns", [3, 1025, 6000])
def test_a_token_of_the_nucleus_is_that_of_all_columns_in_order(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits, uniforms = torch.randn(24, columns) * torch.linspace(0, 6, 24)[:, None], torch.rand(24)  # from flat rows to steep ones
    logits[3, columns // 2 :] = float("-inf")
    uniforms[4], uniforms[5] = 0, 1 - 2**-24
    for top_k in (0, 1, 50, 1500, 9000):
        for top_p in (1e-9, 0.5, 0.9, 0.999, 1 - 1e-7, 1.0):
            sampling = Sampling(0.9, top_k, top_p, 1)
            tokens, _ = sample(logits.to(dtype), uniforms, sampling)
            if top_k or top_p < 1:
                assert torch.equal(tokens, by_sorting(logits.to(dtype), uniforms, sampling)), (top_k, top_p)
            alone = torch.cat([sample(logits[row, None].to(dtype), uniforms[row, None], sampling)[0] for row in range(24)])
            assert torch.equal(tokens, alone)


@pytest.mark.parametrize(("scale", "sorted_columns"), [(4.0, [1024]), (1.0, [1024, 49152])])
def test_few_columns_are_put_into_order_where_those_hold_the_nucleus(
    scale: float, sorted_columns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    shapes, sort = list[tuple[int, ...]](), np.sort

    def sorting(rows: Any, axis: int) -> Any:
        shapes.append(rows.shape)
        return sort(rows, axis=axis)

    monkeypatch.setattr(np, "sort", sorting)
    sample(scale * torch.randn(8, 49152), torch.rand(8), Sampling(1.0, 0, 0.9, 1))
    assert shapes == [(8, columns) for columns in sorted_columns]


@pytest.mark.parametrize("sampling", [Sampling(1e-40, 0, 1.0, 1), Sampling(1e-40, 2, 0.9, 1), Sampling(1e-4, 0, 1.0, 1)])
def test_at_a_temperature_that_is_too_low_to_divide_by_the_likeliest_token_comes(sampling: Sampling) -> None:
    tokens, log_probs = sample(PROBABILITIES.log()[None], torch.tensor([0.99]), sampling)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(log_probs, torch.tensor([0.4]).log())


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, Sampling(1.0, 20, 1.0, LIMIT), Sampling(1.0, 0, 0.9, LIMIT)])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_model_without_probabilities_is_told(llama: LlamaForCausalLM, sampling: Sampling, wrong: float) -> None:
    logits = torch.randn(3, 300)
    logits[1, 7] = wrong
    tokens, log_probs = sample(logits, torch.rand(3), sampling)
    assert log_probs.isnan().tolist() == [False, True, False]
    assert tokens.max() < 300
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = wrong
    with pytest.raises(UserError, match=r"no probabilities for token 1 of an answer to a prompt of \d tokens: a logit is NaN or infinite"):
        answer(llama, sampling)


def test_seeds_draw_as_the_probabilities_say(llama: LlamaForCausalLM) -> None:
    found = generate(llama, [PROMPTS[0]] * 2000, list(range(2000)), Sampling(1.0, 0, 1.0, 1), eos_id=NO_TOKEN, pad_id=PAD, slots=500)
    counts = torch.bincount(torch.tensor(found.answers).flatten(), minlength=llama.config.vocab_size) / 2000
    with torch.no_grad():
        expected = llama(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    # five standard deviations of a count
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / 2000).sqrt() + 1e-3).all()
    assert expected.max() > 0.03


@pytest.mark.parametrize("window", [None, 4])
def test_one_token_of_each_answer_attends_to_its_slot_with_all_options(window: int | None) -> None:
    """What takes the place of a GPU's kernel; each answer by itself, step by step."""
    torch.manual_seed(1)
    lengths, sinks = torch.tensor([9, 0, 5]), torch.randn(4)
    query, new_key, new_value = (torch.randn(3, heads, 1, 8) for heads in (4, 2, 2))
    held = [torch.randn(5, 2, 12, 8) for _ in range(2)]
    found = attend_with_options(query, new_key, new_value, held[0], held[1], lengths, Options(0.7, window, 2.0, sinks))
    for row, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length + 1 - window)
        keys, values = (states[row : row + 1, :, first : length + 1] for states in held)
        assert torch.equal(keys[:, :, -1:], new_key[row : row + 1])
        scores = 2 * torch.tanh(0.7 * query[row : row + 1] @ keys.repeat_interleave(2, 1).mT / 2)
        weights = torch.cat([scores, sinks.view(1, -1, 1, 1)], -1).softmax(-1)[..., :-1]
        torch.testing.assert_close(found[row : row + 1], weights @ values.repeat_interleave(2, 1))


def attended(query: torch.Tensor, slots: list[tuple[torch.Tensor, torch.Tensor]], *, alone: bool, **options: Any) -> torch.Tensor:
    """What one query (B, Q, 1, D) of each slot brings from slots filled with keys and values (H, T, D), the last token's being new."""
    cache, layer = SlotCache(len(slots) + 1, 640, alone=alone), torch.nn.Module()
    cast("Any", layer).layer_idx = 0
    for slot, (keys, values) in enumerate(slots):
        cache.place(slot + 1, [(keys[:, :-1], values[:, :-1])])
        cache.move(slot + 1, slot, keys.shape[1] - 1)
    inputs = cache.decode([keys.shape[1] - 1 for keys, _ in slots], query.dtype, query.device)
    new_keys, new_values = (torch.stack([states[:, -1:] for states in some]) for some in zip(*slots, strict=True))
    held = cache.update(new_keys, new_values, 0)
    return attend(layer, query, *held, inputs["attention_mask"], cache, **options)[0][:, 0]


def made_up(lengths: list[int], queries: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(1)
    slots = [cast("tuple[torch.Tensor, torch.Tensor]", tuple(torch.randn(2, 2, length, 64).to(dtype))) for length in lengths]
    return torch.randn(len(lengths), queries, 1, 64).to(dtype), slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_slots_are_fp32(dtype: torch.dtype) -> None:
    query, slots = made_up([3, 40, *[17] * 20], 6, dtype)
    query *= 4  # scores so large that their rounding would show
    for row, (found, slot) in enumerate(zip(attended(query, slots, alone=False), slots, strict=True)):
        keys, values = (states.float().repeat_interleave(3, 0) for states in slot)
        expected = ((query[row].float() @ keys.mT) / 8).softmax(-1) @ values
        torch.testing.assert_close(found.float(), expected[:, 0], atol=1e-5 if dtype == torch.float32 else 0.015, rtol=0.004)


def sinks(queries: int) -> torch.Tensor:
    return torch.randn(queries, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries", [2, 6, 14])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"s_aux": sinks}, {"softcap": 5.0, "sliding_window": 30}])
def test_what_a_slot_brings_hangs_on_no_neighbour_to_the_last_bit(options: dict[str, Any], queries: int, threads: int) -> None:
    query, slots = made_up([200, 5, 620, 33, *range(210, 222)], queries, torch.float32)
    asked = {name: value(queries) if callable(value) else value for name, value in options.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = attended(query, slots, alone=True, **asked)
        for row, slot in enumerate(slots):
            assert torch.equal(attended(query[row : row + 1], [slot], alone=True, **asked)[0], together[row])
    finally:
        torch.set_num_threads(before)
