"""However a global batch is cut into ranks, micro-batches and rows, each stage computes the same: losses, gradients, weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rlhf import config
from rlhf.config.training import BuiltBase
from rlhf.data import earlier
from rlhf.job import read_lines, write_lines
from rlhf.models.policy import build_policy
from rlhf.models.saving import save_model
from rlhf.models.scalar import initialise_head, load_scalar
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params

BATCH = 16
# (ranks, tokens of a micro-batch, variant of tests/stage_runs.py): everything at once, several parts, and each row by itself
Cut = tuple[int, int, str]
WHOLE: Cut = (1, 100_000, "")
CUTS: list[Cut] = [(1, 600, ""), (1, 250, ""), (1, 1, ""), (1, 250, "padded")]
CUTS += [(2, 100_000, ""), (2, 300, ""), (2, 120, ""), (2, 1, ""), (2, 250, "padded")]
SIDES = ("chosen", "rejected")
STAGES = ("sft", "reward", "awac", "ppo", "dpo")


def two_steps(rows: dict[str, int]) -> dict[str, Any]:
    """Params of two steps of each stage, on prepared files of so many rows.

    With Adam's ε at 1, an update is nearly the gradient itself. At the usual ε it is nearly its sign, which rounding turns over where a
    gradient is zero but for rounding.
    """
    raw = tiny_params()
    for stage, file in (("sft", "sft"), ("reward", "reward"), ("awac", "awac"), ("dpo", "reward")):
        raw[stage] |= {"batch_size": BATCH, "epochs": 2 * BATCH / rows[file]}
    raw["ppo"] |= {"steps": 2, "rollout_batch_size": 2 * BATCH, "mini_batch_size": BATCH, "epochs": 1, "mixture_batch_size": 6}
    raw["ppo"] |= {"critic_warmup_steps": 0, "entropy_coefficient": 0.01, "max_answer_tokens": 8}
    trained = [raw["ppo"]["actor"], raw["ppo"]["critic"], *(raw[stage]["optimizer"] for stage in ("sft", "reward", "awac", "dpo"))]
    for optimizer in trained:
        optimizer |= {"learning_rate": 0.3, "epsilon": 1.0, "warmup_ratio": 0.0}
    return raw


def make_models(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Random models in the place of base, sft and reward."""
    sizes = BuiltBase.model_construct(hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, context_tokens=256)
    policy = build_policy(sizes, tokenizer, 1)
    for name in ("base", "sft"):
        save_model(policy, tokenizer, root / "models" / name)
    reward = load_scalar(root / "models/base", tokenizer, "fp32")
    initialise_head(reward, 1)
    reward.model.config.reward_mean, reward.model.config.reward_std = 0.5, 2.0
    save_model(reward.model, tokenizer, root / "models/reward")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A workspace from which any of the stages can run."""
    root = tmp_path_factory.mktemp("sharding") / "start"
    make_workspace(root, tiny_params(), pairs=120)
    make_models(root, tokenizer)
    pairs = read_lines(root / "data/prepared/reward.jsonl")
    write_lines(root / earlier.FOLDER / "v1.jsonl", ({"prompt": row["prompt"], "answer": row[side]} for row in pairs for side in SIDES))
    rows = {"sft": len(read_lines(root / "data/prepared/sft.jsonl")), "reward": len(pairs), "awac": 2 * len(pairs)}
    set_params(root, two_steps(rows))
    return root


@pytest.fixture(scope="module")
def results(start: Path) -> dict[Cut, Path]:
    """For each cut, a workspace in which the stages have run."""
    places = {cut: start.with_name("-".join(map(str, cut))) for cut in (WHOLE, *CUTS)}
    for (_, tokens, _), place in places.items():
        shutil.copytree(start, place)
        raw = config.load(place / "params.yaml").model_dump(mode="json")
        for layout in raw["launch"]["jobs"].values():
            layout["micro_batch_tokens"] = tokens
        set_params(place, raw)
    for ranks in (1, 2):
        cuts = sorted((cut for cut in places if cut[0] == ranks), key=lambda cut: cut[2])  # once padded, a process stays so
        words = [f"{places[cut].name}/{stage}{cut[2] and ':'}{cut[2]}" for cut in cuts for stage in STAGES]
        run(start.parent, *words, ranks=ranks)
    return places


@pytest.mark.parametrize("stage", STAGES)
def test_losses_gradients_and_weights_do_not_depend_on_the_cut(stage: str, start: Path, results: dict[Cut, Path]) -> None:
    expected_rows = table(results[WHOLE] / f"plots/{stage}.csv")
    expected = load_file(results[WHOLE] / f"models/{stage}/model.safetensors")
    assert len(expected_rows) == 2
    assert all(float(value) > 0.01 for row in expected_rows for name, value in row.items() if name.endswith("grad_norm"))
    # the weights, of one random model at first, have moved by far more than they may differ
    before = load_file(start / "models/base/model.safetensors")
    moved = [(expected[name] - weight).abs().max().item() for name, weight in before.items() if name in expected]
    assert max(moved) > 1e-3
    assert sum(change > 0 for change in moved) == len(moved)
    for cut in CUTS:
        rows = table(results[cut] / f"plots/{stage}.csv")
        for row, expected_row in zip(rows, expected_rows, strict=True):
            found = {name: float(value) for name, value in row.items() if name != "ratio_error"}  # rounding and nothing else
            assert found == pytest.approx({name: float(expected_row[name]) for name in found}, rel=1e-5, abs=1e-5), cut
        torch.testing.assert_close(load_file(results[cut] / f"models/{stage}/model.safetensors"), expected, rtol=0, atol=1e-5)


def test_answers_do_not_depend_on_the_cut(results: dict[Cut, Path]) -> None:
    def answers(root: Path) -> list[tuple[int, object, str]]:
        return [(row["step"], row["prompt"], row["answer"]) for row in read_lines(root / "data/rollouts.jsonl")]

    expected = answers(results[WHOLE])
    assert len(expected) == 2 * 2 * BATCH
    assert len({answer for _, _, answer in expected}) > BATCH
    assert all(answers(root) == expected for root in results.values())


# ------------------------------------------------------------------------------------------------------ the ratio starts at 1


def test_ppo_stops_where_the_ratio_does_not_start_at_1(start: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(start, root)
    said = run(root, "ppo:off", code=1)
    assert re.search(r"UserError: stage ppo, step 1: .*\|ratio − 1\| is 0\.01", said)
    assert not (root / "models/ppo").exists()
