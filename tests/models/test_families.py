"""Model families: on each, padding and packing change nothing, generation is transformers' own, and each stage trains.

Random models of a few thousand weights, with a tokenizer of the project; a family is right when its logits do not depend on the layout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.models.attention import attend_to_pieces
from rlhf.models.packed import pack, pad_rows
from rlhf.models.policy import logits_at
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling
from rlhf.tensors import mask_from_lengths
from tests.models.families import EOS, FAMILIES, PAD, eager, near, near_eager, of_each, padded_left, sequences, tiny
from tests.stage_runs import REPOSITORY, free_port, make_workspace, run, table, tiny_params


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --------------------------------------------------------------------------------------------------------------- the layout


@torch.no_grad()
@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_padded_and_packed_logits_are_those_of_each_sequence_alone(family: str, pad_id: int) -> None:
    model = tiny(family)
    given = [*sequences(), [*sequences((9,))[0], EOS]]  # a real end token counts, whatever pads
    with eager(model):
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
    with eager(model):
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
    with eager(scalar.model):
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
    with eager(model) as reference:
        free = reference.generate(left["input_ids"], eos_token_id=None, **options)[:, width:]
        eos_id = free[0, 4].item()  # the first answer ends by itself
        made = reference.generate(left["input_ids"], eos_token_id=eos_id, **options)[:, width:]
    found = generate(model, prompts, [0] * count, Sampling(0.0, 0, 1.0, 12), eos_id=eos_id, pad_id=pad_id, slots=slots)
    expected = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in made.tolist()]
    assert found.answers == expected
    assert found.ended[0]


@torch.no_grad()
def test_log_probs_of_sampled_tokens_are_those_of_a_full_forward_pass(family: str) -> None:
    model, prompts = tiny(family), sequences(range(1, 33))
    found = generate(model, prompts, range(32), Sampling(0.9, 50, 0.95, 16), eos_id=EOS, pad_id=PAD, slots=7)
    near_eager(model, found, 0.9)


# --------------------------------------------------------------------------------------------------------------- the stages

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, str]:
    """For each family, a workspace in which sft, reward and ppo have taken a step, all in one process; and what the process said.

    Its last stage is refused: sft of a model with 64 positions.
    """
    root = tmp_path_factory.mktemp("families")
    raw = tiny_params()
    raw["sft"]["epochs"] = raw["reward"]["epochs"] = 0.01
    raw["ppo"] |= {"steps": 1, "mini_batch_size": 8, "epochs": 1, "critic_warmup_steps": 0, "mixture_coefficient": 0}
    make_workspace(root / "start", raw, pairs=60)
    for name, model in {**{family: tiny(family) for family in FAMILIES}, "narrow": tiny("llama", max_position_embeddings=64)}.items():
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
import torch
from rlhf import config
from rlhf.engine.distributed import start
from rlhf.engine.partition import born, is_partitioned
from rlhf.job import Job
from rlhf.models.policy import load_policy

start(Job("sft", config.load(), Path.cwd(), Path.cwd(), "cpu", 0, 1, 0))
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
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    own = ranks | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    folders = [str(trained[0] / family / "models/base") for family in FAMILIES]
    words, place = [sys.executable, "-c", BORN, *folders], trained[0] / "opt"
    done = subprocess.run(words, cwd=place, env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_stage_refuses_what_is_longer_than_the_model_takes(trained: tuple[Path, str]) -> None:
    root, said = trained
    assert "sft.max_tokens: 192 tokens are more than the model's number of positions, 64" in said
    assert not (root / "narrow/models/sft").exists()
