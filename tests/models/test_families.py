"""Model families: on each, padding and packing change nothing, generation is transformers' own, and each stage trains.

Random models of a few thousand weights, with a tokenizer of the project; a family is right when its logits do not depend on the layout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models.attention import attend_to_pieces
from rlhf.models.packed import Packed, pack, pad_rows
from rlhf.models.policy import check_length, load_policy, logits_at
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling
from rlhf.tensors import mask_from_lengths
from tests.stage_runs import REPOSITORY, free_port, make_workspace, run, table, tiny_params

VOCABULARY = 400
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**TINY, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": TINY,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "phi3": GROUPED,
}
WINDOWED = {"mistral": {}, "gemma2": {}, "phi3": {}, "qwen2": {"use_sliding_window": True, "max_window_layers": 0}}
LENGTHS = (7, 30, 1, 12, 45, 25)
PAD, EOS = 0, 1  # of the project's tokenizer


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random model whose logits differ clearly from token to token."""
    torch.manual_seed(1)
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **FAMILIES[family], **special, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    attend_to_pieces(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def sequences(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def padded_left(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """A batch as DeepSpeed-Chat and TRL make it: prompts end in the same column, positions count from the first real token."""
    width = max(map(len, rows))
    mask = mask_from_lengths(torch.full((len(rows),), width), width, start=torch.tensor([width - len(row) for row in rows])).long()
    ids = pad_rows([row[::-1] for row in rows], pad_id).flip(1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def of_each(packed: Packed, values: Tensor) -> list[Tensor]:
    """The values of each sequence, out of what was computed for the packed row."""
    return [values[places[:length]] for places, length in zip(packed.places, packed.lengths.tolist(), strict=True)]


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --------------------------------------------------------------------------------------------------------------- the layout


@torch.no_grad()
@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_padded_and_packed_logits_are_those_of_each_sequence_alone(family: str, pad_id: int) -> None:
    model = tiny(family)
    given = [*sequences(), [*sequences((9,))[0], EOS]]  # a real end token counts, whatever pads
    alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in given]
    assert torch.cat(alone).std() > 0.05
    packed = pack(given, "cpu")
    side_by_side = of_each(packed, model(**packed.inputs, use_cache=False).logits[0])
    left = model(**padded_left(given, pad_id), use_cache=False).logits
    for ids, expected, logits, row in zip(given, alone, side_by_side, left, strict=True):
        near(logits, expected)
        near(row[-len(ids) :], expected)


def test_logits_at_some_places_and_their_gradients_are_those_of_all(family: str) -> None:
    model = tiny(family)
    prompt, *answers = sequences((20, 9, 4, 13, 6))
    packed = pack([prompt + answer for answer in answers], "cpu")  # pairs, which share their beginning
    wanted = packed.predictions([[0] * len(prompt) + [1] * len(answer) for answer in answers])
    expected = torch.cat([model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for answer in answers])
    found = logits_at(model, packed, wanted.places)
    near(found, expected)
    assert wanted.targets.tolist() == [token for answer in answers for token in answer]
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    gradients = [torch.autograd.grad((logits * weights).sum(), list(model.parameters())) for logits in (found, expected)]
    scale = max(gradient.abs().max().item() for gradient in gradients[1])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * scale)


@torch.no_grad()
@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_the_score_is_read_at_the_last_real_token_of_any_layout(family: str, pad_id: int) -> None:
    config = tiny(family).config
    config.num_labels = 1
    scalar = ScalarModel(AutoModelForSequenceClassification.from_config(config)).eval()
    attend_to_pieces(scalar.model)
    given = [[*ids, EOS] for ids in sequences()]
    alone = torch.stack([scalar(input_ids=torch.tensor([ids]))[-1] for ids in given])
    assert alone.std() > 1e-3
    packed = pack(given, "cpu")
    near(scalar(**packed.inputs)[packed.last], alone)
    near(scalar(**packed.read_at(packed.last))[packed.last], alone)
    left = padded_left(given, pad_id)
    near(scalar(**left).view(left["input_ids"].shape)[:, -1], alone)
    ids = pad_rows(given, pad_id)
    lengths = torch.tensor([len(row) for row in given])
    right = scalar(input_ids=ids, attention_mask=mask_from_lengths(lengths, ids.shape[1]).long()).view(ids.shape)
    near(right[torch.arange(len(given)), lengths - 1], alone)


# one prompt alone, all at once, and new ones into slots that fall free
@pytest.mark.parametrize(("count", "slots", "pad_id"), [(1, 1, PAD), (7, 7, EOS), (64, 5, EOS), (64, 64, PAD)])
def test_greedy_answers_are_those_of_transformers(family: str, count: int, slots: int, pad_id: int) -> None:
    model, prompts = tiny(family), sequences([5, 1, 9, 2, *range(3, 63)])[:count]
    left = padded_left(prompts, pad_id)
    options = {"attention_mask": left["attention_mask"], "do_sample": False, "max_new_tokens": 12, "pad_token_id": pad_id}
    width = left["input_ids"].shape[1]
    free = cast(Any, model).generate(left["input_ids"], eos_token_id=None, **options)[:, width:]
    eos_id = free[0, 4].item()  # the first answer ends by itself
    made = cast(Any, model).generate(left["input_ids"], eos_token_id=eos_id, **options)[:, width:]
    found = generate(model, prompts, [0] * count, Sampling(0.0, 0, 1.0, 12), eos_id=eos_id, pad_id=pad_id, slots=slots)
    expected = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in made.tolist()]
    assert found.answers == expected
    assert found.ended[0]


@torch.no_grad()
def test_log_probs_of_sampled_tokens_are_those_of_a_full_forward_pass(family: str) -> None:
    model, prompts = tiny(family), sequences(range(1, 33))
    found = generate(model, prompts, range(32), Sampling(0.9, 50, 0.95, 16), eos_id=EOS, pad_id=PAD, slots=7)
    for prompt, answer, log_probs in zip(prompts, found.answers, found.log_probs, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.9).log_softmax(-1)[torch.arange(len(answer)), answer]
        torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------- what cannot be run rightly


@torch.no_grad()
@pytest.mark.parametrize("family", WINDOWED)
def test_sequences_longer_than_a_sliding_window_are_refused(family: str) -> None:
    model = tiny(family, sliding_window=16, **WINDOWED[family])
    fits, longer = sequences((16, 10)), sequences((17, 10))
    for given, agrees in ((fits, True), (longer, False)):
        packed = pack(given, "cpu")
        found = of_each(packed, model(**packed.inputs, use_cache=False).logits[0])
        alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in given]
        assert all(torch.allclose(logits, row, atol=1e-5) for logits, row in zip(found, alone, strict=True)) is agrees
    check_length(model, 16, "sft.max_tokens")
    with pytest.raises(UserError, match=r"sft\.max_tokens: 17 tokens .* sliding attention window, 16 \(lower it to 16 at most\)"):
        check_length(model, 17, "sft.max_tokens")


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(UserError, match=r"ppo\.max_prompt_tokens: 2049 tokens .* number of positions, 2048"):
        check_length(tiny("opt"), 2049, "ppo.max_prompt_tokens")
    check_length(tiny("qwen2"), 5000, "a window of 4096 that no layer uses")


@pytest.mark.parametrize(("family", "sizes"), [("gptj", {"rotary_dim": 4}), ("bloom", {}), ("mpt", {})])
def test_a_family_that_cannot_take_packed_rows_is_refused(
    family: str, sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be a causal language model .* does not support .*scaled_dot_product_attention"):
        load_policy(tmp_path, "fp32")
    with pytest.raises(UserError, match=r"cannot be a reward model .* does not support .*scaled_dot_product_attention"):
        load_scalar(tmp_path, tokenizer, "fp32")


def test_a_family_that_does_not_hand_the_pieces_on_is_refused_at_its_first_row(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", vocab_size=50, **sizes)).save_pretrained(tmp_path)
    model = load_policy(tmp_path, "fp32")
    with pytest.raises(UserError, match=r"does not hand on to its attention .* another family"):
        model(**pack([[1, 2, 3], [4, 5]], "cpu").inputs)


# --------------------------------------------------------------------------------------------------------------- the stages

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, str]:
    """For each family, a workspace in which sft, reward and ppo have taken a step, all in one process; and what the process said.

    Its last stage is refused: sft of a model with a window of 64 tokens.
    """
    root = tmp_path_factory.mktemp("families")
    raw = tiny_params()
    raw["sft"]["epochs"] = raw["reward"]["epochs"] = 0.01
    raw["ppo"] |= {"steps": 1, "mini_batch_size": 8, "epochs": 1, "critic_warmup_steps": 0, "mixture_coefficient": 0}
    make_workspace(root / "start", raw, pairs=60)
    for name, model in {**{family: tiny(family) for family in FAMILIES}, "narrow": tiny("mistral", sliding_window=64)}.items():
        shutil.copytree(root / "start", root / name)
        save_model(model, tokenizer, root / name / "models/base")
    return root, run(root, *(f"{family}/{stage}" for family in FAMILIES for stage in STAGES), "narrow/sft", code=1)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_each_stage_changes_the_weights(family: str, stage: str, trained: tuple[Path, str]) -> None:
    root, _ = trained
    before = load_file(root / family / "models" / ("sft" if stage == "ppo" else "base") / "model.safetensors")
    after = load_file(root / family / "models" / stage / "model.safetensors")
    (step,) = table(root / family / f"plots/{stage}.csv")
    norms = [float(value) for name, value in step.items() if name.endswith("grad_norm")]
    assert min(norms) > 1e-3
    # an output head that is tied to the embedding is stored once
    common = before.keys() & after.keys()
    assert len(common) > 5
    changed = [name for name in common if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.8 * len(common), (changed, common)
    if stage == "ppo":
        assert float(step["ratio_error"]) < 1e-4
    if stage == "reward":
        assert AutoModelForSequenceClassification.from_pretrained(root / family / "models/reward").config.num_labels == 1


BORN = """
import sys
from pathlib import Path
import deepspeed, torch
from rlhf.engine.partition import born, is_partitioned
from rlhf.models.policy import load_policy

deepspeed.init_distributed("gloo")
for folder in map(Path, sys.argv[1:]):
    whole = load_policy(folder, "bf16")
    with born({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}):
        parts = load_policy(folder, "bf16")
    assert is_partitioned(parts), folder
    assert {parameter.dtype for parameter in parts.parameters()} == {torch.bfloat16}, folder
    expected = dict(whole.named_buffers())
    assert expected.keys() == dict(parts.named_buffers()).keys()
    for name, buffer in parts.named_buffers():
        assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name]), (folder, name)
"""


def test_a_model_born_in_parts_keeps_the_precision_of_its_positions(trained: tuple[Path, str]) -> None:
    """DeepSpeed would round the frequencies of rotary embeddings: in bf16, tokens would stand at other places than in a whole model."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    own = place | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    folders = [str(trained[0] / family / "models/base") for family in FAMILIES]
    done = subprocess.run([sys.executable, "-c", BORN, *folders], env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_stage_refuses_what_the_window_does_not_hold(trained: tuple[Path, str]) -> None:
    root, said = trained
    assert "sft.max_tokens: 192 tokens are more than the model's sliding attention window, 64" in said
    assert not (root / "narrow/models/sft").exists()
