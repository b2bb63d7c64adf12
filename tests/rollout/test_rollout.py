"""The rollout engine: which weights it samples with, what it reads and keeps, how answers end."""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.rollout.decoding import Asked, Decoder
from rlhf.rollout.generate import READ, Rollouts, generate
from rlhf.rollout.products import joined, laid_out, side_by_side
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.stops import at_texts
from rlhf.rollout.weights import folded, policy_weights
from tests.stage_runs import make_workspace, run, set_params, tiny_params
from tests.stages.test_sharding import make_models

PAD, NO_TOKEN = 0, -1
DRAWN = Sampling(1.0, 0, 1.0, 24)
PROMPTS = [[11, 12, 13, 14, 15], [21], [31, 32, 33, 34, 35, 36, 37, 38, 39], [41, 42]]


def answer(model: LlamaForCausalLM, prompts: list[list[int]] = PROMPTS, slots: int = 4, **options: Any) -> Rollouts:
    return generate(model, prompts, range(len(prompts)), DRAWN, **({"eos_id": NO_TOKEN, "pad_id": PAD} | options), slots=slots)


@pytest.fixture
def passes(llama: LlamaForCausalLM) -> Iterator[list[tuple[int, ...]]]:
    """Shape of the tokens of each forward pass."""
    shapes: list[tuple[int, ...]] = []
    hook = llama.register_forward_pre_hook(lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    yield shapes
    hook.remove()


# -------------------------------------------------------------------------------------------------------- continuous batching


def test_answers_do_not_depend_on_the_number_of_slots(llama: LlamaForCausalLM) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 400, (length,), generator=generator).tolist() for length in range(1, 41)]
    # answers end after 1 to 24 tokens, so that slots fall free at any time
    plan = torch.randint(1, 25, (40,), generator=generator).tolist()
    expected = answer(llama, prompts, 1, stop=lambda number, found: len(found) == plan[number])
    assert expected.lengths == plan
    for slots in (3, 16, 40, 100):
        found = answer(llama, prompts, slots, stop=lambda number, found: len(found) == plan[number])
        assert found.answers == expected.answers
        # rounding, which this model's large weights magnify
        torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=2e-3)


class Foreseeing(Decoder):
    """Takes a step before the one before it is looked at, as a GPU does."""

    foresees = True
    last: list[int]
    taken: ClassVar[list[bool]] = []

    def ask(self, tokens: Sequence[int] | None, lengths: Sequence[int], uniforms: Tensor) -> Asked:
        drawn = super().ask(self.last[: len(lengths)] if tokens is None else tokens, lengths, uniforms)()
        self.last = drawn[0]
        self.taken.append(tokens is None)
        return lambda: drawn


@pytest.mark.parametrize("slots", [3, 16, 40])
def test_steps_that_are_asked_for_ahead_give_the_same_answers(llama: LlamaForCausalLM, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, 400, (length,), generator=generator).tolist() for length in range(1, 41)]
    plan = torch.randint(1, 27, (40,), generator=generator).tolist()  # some end by their length
    expected = answer(llama, prompts, slots, stop=lambda number, found: len(found) == plan[number])
    monkeypatch.setattr("rlhf.rollout.generate.decoder", Foreseeing)
    monkeypatch.setattr(Foreseeing, "taken", [])
    found = answer(llama, prompts, slots, stop=lambda number, found: len(found) == plan[number])
    assert (found.answers, found.finish) == (expected.answers, expected.finish)
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=2e-3)
    assert any(Foreseeing.taken)


def flat(rollouts: Rollouts) -> Tensor:
    return torch.tensor([value for row in rollouts.log_probs for value in row])


def test_a_slot_that_falls_free_takes_the_next_prompt(llama: LlamaForCausalLM, passes: list[tuple[int, ...]]) -> None:
    lengths = [4, 3, 2, 3]  # of the answers to prompts of 5, 1, 9 and 2 tokens
    found = answer(llama, slots=2, stop=lambda number, tokens: len(tokens) == lengths[number])
    assert found.lengths == lengths
    # the two longest prompts side by side; a token of each, which is the end of one; the prompt of 2, and so on: (rows, tokens of each)
    assert passes == [(1, 14), (2, 1), (1, 2), (2, 1), (2, 1), (1, 1), (1, 1), (1, 1)]


def test_a_prompt_is_read_once_for_all_its_answers(llama: LlamaForCausalLM, passes: list[tuple[int, ...]]) -> None:
    long, short = PROMPTS[2], PROMPTS[1]
    together = answer(llama, [long, short, long, long, long, short], slots=2)
    assert sum(rows * width for rows, width in passes if width > 1) == len(long)
    assert len({tuple(tokens) for tokens in together.answers}) == 6
    alone = generate(llama, [long], [3], DRAWN, eos_id=NO_TOKEN, pad_id=PAD, slots=1)
    assert together.answers[3] == alone.answers[0]


def test_what_prompts_begin_with_is_read_once(
    llama: LlamaForCausalLM, passes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READ, "cpu", 60)
    system = list(range(100, 150))
    prompts = [system + prompt for prompt in PROMPTS]  # of 67 tokens that are not the same, 17 of them their own
    together = answer(llama, prompts)
    assert [shape for shape in passes if shape[1] > 1] == [(1, 50 + 9), (1, 50 + 5 + 2 + 1)]
    alone = [
        generate(llama, [prompt], [seed], DRAWN, eos_id=NO_TOKEN, pad_id=PAD, slots=1).answers[0] for seed, prompt in enumerate(prompts)
    ]
    assert together.answers == alone


def test_every_step_is_one_forward_pass(llama: LlamaForCausalLM, passes: list[tuple[int, ...]]) -> None:
    steps: list[int] = []

    def together(going: bool) -> bool:
        steps.append(len(passes))
        return going

    # ranks that gather weights layer by layer wait for each other's passes; here most prompts have been read when their turn comes
    answer(llama, [PROMPTS[2]] * 5 + [PROMPTS[1]] * 3, slots=2, stop=lambda number, found: len(found) == number % 3 + 1, together=together)
    assert steps == list(range(len(passes) + 1))


def test_prompts_are_read_some_at_a_time(llama: LlamaForCausalLM, passes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(llama)
    monkeypatch.setitem(READ, "cpu", 8)
    assert answer(llama).answers == whole.answers
    assert [shape[1] for shape in passes if shape[1] > 1] == [17, 9, 8]  # at once; then the prompt of 9 alone, and those of 5, 2 and 1


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_weights_laid_out_for_a_rollout_are_those_of_the_moment(llama: LlamaForCausalLM, precision: torch.dtype) -> None:
    torch.nn.Module.to(llama, precision)
    rows = torch.randn(3, llama.config.hidden_size, dtype=precision)
    layer = llama.model.layers[0].self_attn.q_proj
    copies = precision == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else torch multiplies by itself
    with torch.no_grad(), laid_out(llama):
        torch.testing.assert_close(layer(rows), rows @ layer.weight.T)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(rows), rows @ layer.weight.T / (2 if copies else 1))
    with torch.no_grad(), laid_out(llama):
        torch.testing.assert_close(layer(rows), rows @ layer.weight.T)
    assert "forward" not in vars(layer)


def test_a_processor_without_bfloat16_answers_in_it(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("bf16 path needs the cpu support avx512bw, avx512vl and avx512dq")  # what torch says there

    torch.nn.Module.to(llama, torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    assert answer(llama).lengths == [24] * 4


@pytest.mark.parametrize("flat", [False, True])
def test_layers_that_are_given_the_same_rows_make_one_product(llama: LlamaForCausalLM, flat: bool) -> None:
    layer = llama.model.layers[0]
    parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    if flat:  # as an optimiser lays them
        whole = torch.cat([part.weight.detach().flatten() for part in parts])
        for part, own in zip(parts, whole.split([part.weight.numel() for part in parts]), strict=True):
            part.weight.data = own.view_as(part.weight)
    assert (side_by_side([part.weight.detach() for part in parts]).data_ptr() == parts[0].weight.data_ptr()) == flat
    rows = torch.randn(2, 3, llama.config.hidden_size)
    with torch.no_grad():
        products, others = joined(llama), torch.randn(4, llama.config.hidden_size)
        assert len(products) == 5 * len(llama.model.layers)
        for given in (rows, others, rows):
            for part in parts:
                torch.testing.assert_close(products[part](given), part(given))
        torch.testing.assert_close(products[parts[2]](others), parts[2](others))  # in any order


def test_the_last_layer_multiplies_what_the_logits_need(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    product = torch.ops.mkldnn._linear_pointwise

    def counted(inputs: Tensor, *rest: Any) -> Tensor:
        rows.append(inputs.shape[-2])
        return product(inputs, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    answer(llama, stop=lambda number, found: True)
    # two layers of seven products each; from the last one's output of attention on, the four last tokens alone, and then the logits
    assert rows == [17] * 10 + [4] * 5


def test_answers_end_where_the_context_does(llama: LlamaForCausalLM) -> None:
    found = answer(llama, [[7] * 104, [7] * 125, [7] * 127])
    assert found.lengths == [24, 3, 1]
    assert found.finish == ["length"] * 3
    with pytest.raises(UserError, match=r"prompt and answer: 129 tokens .* number of positions, 128"):
        answer(llama, [[7] * 3, [7] * 128])


def test_no_prompt_has_no_answer(llama: LlamaForCausalLM) -> None:
    assert answer(llama, []).answers == []


def test_nothing_of_a_rollout_stays_in_memory_or_in_the_model(llama: LlamaForCausalLM) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, torch.nn.Parameter) for thing in gc.get_objects())

    answer(llama)
    llama.train()
    before = tensors()
    found = answer(llama, slots=3)
    assert tensors() == before
    with pytest.raises(RuntimeError, match="stop here"):
        answer(llama, stop=raise_error)
    assert llama.config._attn_implementation == "packed"
    assert llama.training
    # what was sampled without gradients can be trained on
    llama(torch.tensor([found.prompts[0] + found.answers[0]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in llama.parameters())


def raise_error(number: int, found: list[int]) -> bool:
    raise RuntimeError("stop here")


# --------------------------------------------------------------------------------------------------------- how answers end


def test_answers_say_how_they_ended(llama: LlamaForCausalLM) -> None:
    free = answer(llama)
    eos_id = free.answers[0][3]
    found = answer(llama, eos_id=eos_id, stop=lambda number, tokens: number == 1 and len(tokens) == 2)
    ends = [row.index(eos_id) + 1 if eos_id in row else 24 for row in free.answers]
    assert found.lengths == [ends[0], min(2, ends[1]), *ends[2:]]
    assert found.finish[:2] == ["eos", "stop"]
    assert found.finish[2:] == ["eos" if eos_id in row else "length" for row in free.answers[2:]]
    assert found.ended == [finish != "length" for finish in found.finish]


def test_answers_stop_at_a_text(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    free = answer(llama)
    first = str(tokenizer.decode(free.answers[0]))
    text = first[len(first) // 2 :][:3]  # it may begin and end within tokens
    found = answer(llama, stop=at_texts(tokenizer, ["never written, and long", text]))
    for tokens, whole, finish in zip(found.answers, free.answers, found.finish, strict=True):
        assert tokens == whole[: len(tokens)]
        assert (text in tokenizer.decode(tokens)) == (finish == "stop")
        assert text not in tokenizer.decode(tokens[:-1])
    assert found.finish[0] == "stop"


# --------------------------------------------------------------------------------------------------------------- the weights


def adapted(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """With adapters that change much."""
    get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def test_adapters_are_folded_in_and_out_without_a_trace(llama: LlamaForCausalLM) -> None:
    plain = answer(llama)
    model = adapted(llama)
    beside = answer(model)
    assert beside.answers != plain.answers
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.state_dict().items()}
    with folded(model):
        calls: list[str] = []
        hooks = [
            part.register_forward_hook(lambda *_: calls.append("adapter"))
            for name, part in model.named_modules()
            if "lora_A.default" in name
        ]
        inside = answer(model)
        for hook in hooks:
            hook.remove()
        assert calls == []
    assert inside.answers == beside.answers
    torch.testing.assert_close(flat(inside), flat(beside), rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == place and torch.equal(after[name], weight) for name, (place, weight) in before.items())
    assert torch.equal(flat(answer(model)), flat(beside))


@pytest.mark.parametrize(("dtype", "inside"), [(torch.float32, True), (torch.bfloat16, False)])
def test_in_half_precision_adapters_stay_beside_the_weights(llama: LlamaForCausalLM, dtype: torch.dtype, *, inside: bool) -> None:
    model = adapted(llama).to(dtype)  # type: ignore[arg-type]  # transformers wraps `to`
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    with policy_weights(model, "whole") as together:
        assert (together(True), together(False)) == (True, False)
        assert [layer.merged for layer in layers] == [inside] * 14
    assert not any(layer.merged for layer in layers)


def layout(stage: int, *, lora: bool, gather: str = "whole") -> dict[str, Any]:
    """Params of two steps of PPO, the first of which moves the policy by much."""
    raw = tiny_params()
    trained = {"zero_stage": stage, "offload_optimizer": False, "offload_parameters": False}
    raw["launch"]["engines"] |= {"policy": trained}
    raw["launch"]["rollout"] |= {"slots": 3, "gather": gather}
    raw["ppo"] |= {"steps": 2, "critic_warmup_steps": 0, "mixture_coefficient": 0, "epochs": 1, "checkpoint_every": 100}
    raw["ppo"]["actor"]["learning_rate"] = 0.01
    if lora:
        raw["ppo"]["actor_lora"] = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "learning_rate": 0.05}
    return raw


LAYOUTS = {f"{'lora' if lora else 'full'}-{stage}": layout(stage, lora=lora) for lora in (False, True) for stage in range(4)}
LAYOUTS |= {f"{name}-3-layers": layout(3, lora=name == "lora", gather="layers") for name in ("full", "lora")}
COMPARED = re.compile(r"(\S+), version 1: off by (\S+), from the weights before by (\S+)")


def test_each_rollout_uses_the_weights_of_the_last_update(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_workspace(tmp_path / "start", tiny_params(), 60)
    make_models(tmp_path / "start", tokenizer)
    for name, raw in LAYOUTS.items():
        shutil.copytree(tmp_path / "start", tmp_path / name)
        set_params(tmp_path / name, raw)
    first, *others = LAYOUTS
    found = COMPARED.findall(run(tmp_path, f"{first}/ppo:compared", *(f"{name}/ppo" for name in others), ranks=2))
    assert [name for name, _, _ in found] == list(LAYOUTS)
    for name, off, off_before in found:
        assert float(off) < 1e-4, name
        assert float(off_before) > 0.1, name
