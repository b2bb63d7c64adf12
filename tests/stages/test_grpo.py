"""Stage grpo on tiny models: every algorithm by its values, however a batch is cut; dynamic sampling, the moving reference, kills."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rlhf import config
from rlhf.config import algorithms
from rlhf.job import read_lines
from rlhf.models.policy import load_policy
from rlhf.models.saving import save_model
from rlhf.plan import memory
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params
from tests.stages.test_sharding import make_models

OUTPUTS = ("models/grpo/model.safetensors", "data/rollouts.jsonl", "metrics/grpo.json", "plots/grpo.csv")
# (ranks, tokens of a micro-batch, variant of tests/stage_runs.py)
Cut = tuple[int, int, str]
WHOLE: Cut = (1, 100_000, "")
CUTS: list[Cut] = [(1, 300, ""), (1, 1, ""), (1, 250, "padded"), (2, 300, ""), (2, 1, "")]


def params_of(algorithm: str, **changes: Any) -> dict[str, Any]:
    """Params of two steps by the values of an algorithm's name. With Adam's ε at 1, an update is nearly the gradient itself."""
    raw = tiny_params() | {"algorithm": algorithm}
    grpo = raw["grpo"] | {"steps": 2, "rollout_batch_size": 16, "mini_batch_size": 8, "max_answer_tokens": 12, "entropy_coefficient": 0.01}
    for key, value in algorithms.values(algorithm, grpo).items():
        section, _, name = key.rpartition(".")
        (grpo[section] if section else grpo)[name] = value
    grpo["answers_per_prompt"] = min(grpo["answers_per_prompt"], 4)
    grpo["actor"] |= {"learning_rate": 0.3, "epsilon": 1.0, "warmup_ratio": 0.0}
    raw["grpo"] = grpo | changes
    return raw


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A workspace with data, and with a policy whose answers often end by themselves."""
    root = tmp_path_factory.mktemp("grpo") / "start"
    make_workspace(root, tiny_params(), pairs=120)
    make_models(root, tokenizer)
    policy = load_policy(root / "models/sft", "fp32")
    with torch.no_grad():
        policy.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4
    save_model(policy, tokenizer, root / "models/sft")
    return root


def place(start: Path, root: Path, raw: dict[str, Any]) -> Path:
    shutil.copytree(start, root)
    set_params(root, raw)
    return root


def rows_of(root: Path) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items() if value} for row in table(root / "plots/grpo.csv")]


# ------------------------------------------------------------------------------------------------------- cuts of a batch


@pytest.fixture(scope="module")
def results(start: Path) -> dict[tuple[str, Cut], Path]:
    """For each algorithm and cut, a workspace in which the stage has run."""
    places = {(name, cut): start.with_name(f"{name}-{'-'.join(map(str, cut))}") for name in algorithms.VALUES for cut in (WHOLE, *CUTS)}
    for (name, (_, tokens, _)), root in places.items():
        raw = params_of(name)
        raw["launch"]["jobs"]["grpo"]["micro_batch_tokens"] = tokens
        place(start, root, raw)
    for ranks in (1, 2):
        found = sorted(
            (found for found in places if found[1][0] == ranks), key=lambda found: found[1][2]
        )  # once padded, a process stays so
        run(start.parent, *(f"{places[one].name}/grpo{one[1][2] and ':'}{one[1][2]}" for one in found), ranks=ranks)
    return places


@pytest.mark.parametrize("name", algorithms.VALUES)
def test_losses_gradients_and_weights_do_not_depend_on_the_cut(name: str, start: Path, results: dict[tuple[str, Cut], Path]) -> None:
    whole = results[name, WHOLE]
    expected, weights = rows_of(whole), load_file(whole / "models/grpo/model.safetensors")
    assert len(expected) == 2
    assert all(row["actor_grad_norm"] > 0.01 and row["ratio_error"] < 1e-4 for row in expected)
    assert any(row["advantage_std"] > 0.1 and 0 < row["eos_rate"] < 1 for row in expected)
    before = load_file(start / "models/sft/model.safetensors")
    assert max((weights[key] - before[key]).abs().max().item() for key in weights) > 1e-3
    for cut in CUTS:
        for row, other in zip(rows_of(results[name, cut]), expected, strict=True):
            for rounded in ("ratio_error", "clip_fraction"):  # rounding alone; where an advantage is 0 but for it, it says which side clips
                del row[rounded]
            # of one token, and not a mean: the rounding of two log-probabilities, whatever the ratio is
            assert row.pop("ratio_max") == pytest.approx(other["ratio_max"], abs=2e-5), cut
            assert row == pytest.approx({key: other[key] for key in row}, rel=1e-5, abs=2e-6), cut
        torch.testing.assert_close(load_file(results[name, cut] / "models/grpo/model.safetensors"), weights, rtol=0, atol=2e-6)


def test_answers_to_a_prompt_stand_side_by_side_and_differ(results: dict[tuple[str, Cut], Path]) -> None:
    records = read_lines(results["grpo", WHOLE] / "data/rollouts.jsonl")
    assert len(records) == 2 * 16
    groups = [records[first : first + 4] for first in range(0, len(records), 4)]
    assert all(len({json.dumps(row["prompt"]) for row in group}) == 1 for group in groups)
    assert sum(len({row["answer"] for row in group}) > 1 for group in groups) > len(groups) // 2
    for cut in CUTS:
        assert read_lines(results["grpo", cut] / "data/rollouts.jsonl") == [
            row | {"kl": pytest.approx(row["kl"], abs=1e-5), "score": pytest.approx(row["score"], abs=1e-5)} for row in records
        ]


@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_a_reference_is_held_only_where_it_pulls(name: str, results: dict[tuple[str, Cut], Path]) -> None:
    root = results[name, WHOLE]
    run(root, "evaluate")
    records, course = read_lines(root / "data/rollouts.jsonl"), table(root / "plots/gold_against_kl.csv")
    found = [row["kl"] is not None for row in records] + ["kl" in row for row in rows_of(root)] + [row["kl"] != "" for row in course]
    assert set(found) == {name == "grpo"}
    assert "kl" in table(root / "plots/grpo.csv")[0]  # dvc.yaml draws it
    assert json.loads((root / "metrics/evaluate.json").read_text(encoding="utf-8"))["kl"] > 0


# ------------------------------------------------------------------------------------------------------- kills, and what else there is

# dynamic sampling, a reference that moves, an average, a sampler that cuts and is made up for: whatever a checkpoint may have to hold
ALL: dict[str, Any] = {
    "steps": 5,
    "resample_rounds": 2,
    "answers_per_prompt": 2,
    "reference_every": 3,
    "ema_decay": 0.5,
    "top_k": 100,
    "overlong": {"buffer": 6, "factor": 0.5},
    "mismatch": {"correction": "tis", "low": 0.5, "high": 2.0},
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(start: Path, tmp_path: Path, ranks: int) -> None:
    roots = [place(start, tmp_path / name, params_of("grpo", **ALL)) for name in ("root", "unbroken")]
    run(roots[0], "grpo:killed", code=-signal.SIGKILL, ranks=ranks)
    said = run(tmp_path, "root/grpo:killed", code=-signal.SIGKILL, ranks=ranks)
    assert "grpo: goes on from step 2" in said
    assert "grpo: goes on from step 4" in run(tmp_path, "root/grpo", "unbroken/grpo", ranks=ranks)
    assert [path for path in OUTPUTS if (roots[0] / path).read_bytes() != (roots[1] / path).read_bytes()] == []
    rows = rows_of(roots[1])
    assert sum(row["groups_replaced"] for row in rows) > 0
    found = json.loads((roots[1] / "metrics/grpo.json").read_text(encoding="utf-8"))
    assert found["groups"] - found["groups_replaced"] == 5 * 8


def test_groups_that_tell_nothing_are_replaced_within_the_bound(start: Path, tmp_path: Path) -> None:
    told = {"answers_per_prompt": 2, "steps": 3}
    for name, rounds in (("none", 0), ("some", 1), ("many", 20)):
        place(start, tmp_path / name, params_of("dapo", resample_rounds=rounds, **told))
    # every answer is cut off: all rewards are equal, and the bound ends it
    place(
        start,
        tmp_path / "hopeless",
        params_of("dapo", resample_rounds=2, max_answer_tokens=1, no_eos_reward=-1.0, reward_clip=1e-9, **told),
    )
    run(tmp_path, *(f"{name}/grpo" for name in ("none", "some", "many", "hopeless")))
    equal = {name: [row["equal_groups"] for row in rows_of(tmp_path / name)] for name in ("none", "some", "many", "hopeless")}
    assert max(equal["none"]) > 0
    assert equal["some"][0] < equal["none"][0]
    assert equal["many"] == [0.0] * 3
    assert [row["groups_replaced"] for row in rows_of(tmp_path / "none")] == [0.0] * 3


def test_the_reference_follows_the_policy(start: Path, tmp_path: Path) -> None:
    for name, every in (("never", None), ("moved", 2)):
        place(start, tmp_path / name, params_of("grpo", steps=4, reference_every=every))
    run(tmp_path, "never/grpo", "moved/grpo")
    never, moved = (rows_of(tmp_path / name) for name in ("never", "moved"))
    assert moved[:2] == never[:2]
    assert moved[2]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(moved[3]["kl"]) > 1e-4
    assert abs(never[2]["kl"]) > 1e-4


def test_ranks_that_share_models_out_compute_the_same(start: Path, tmp_path: Path) -> None:
    for name in ("whole", "shared"):
        raw = params_of("remax", reference_every=1)
        raw["launch"]["jobs"]["grpo"]["micro_batch_tokens"] = 300
        if name == "shared":
            for engine in raw["launch"]["engines"].values():
                engine["zero_stage"] = 3
        place(start, tmp_path / name, raw)
    run(tmp_path, "whole/grpo", "shared/grpo", ranks=2)
    for row, other in zip(rows_of(tmp_path / "shared"), rows_of(tmp_path / "whole"), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_what_top_k_cuts_is_known_and_made_up_for(start: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"top_k": 5, "steps": 1}
    place(start, tmp_path / "plain", params_of("grpo", **changes))
    place(start, tmp_path / "mask", params_of("grpo", **changes, mismatch={"correction": "icepop", "low": 0.5, "high": 2.0}))
    place(start, tmp_path / "full", params_of("grpo", steps=1))
    run(tmp_path, "plain/grpo", "mask/grpo", "full/grpo")
    plain, mask, full = (rows_of(tmp_path / name)[0] for name in ("plain", "mask", "full"))
    # five of hundreds of tokens, all about as likely: π_old / π_rollout is their share
    assert plain["mismatch_mean"] > 1
    assert plain["ratio_error"] < 1e-4
    assert (plain["left_out"], full["mismatch_max"]) == (0, 0)
    assert mask["left_out"] > 0.5
    assert abs(mask["policy_loss"]) < abs(plain["policy_loss"]) or mask["actor_grad_norm"] < plain["actor_grad_norm"]


def test_adapters_learn_beside_a_reference_that_is_the_policy_without_them(start: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "learning_rate": 1e-2}
    root = place(start, tmp_path / "root", params_of("grpo", actor_lora=lora, actor=params_of("grpo")["grpo"]["actor"] | {"epsilon": 1e-8}))
    run(root, "grpo")
    first, second = rows_of(root)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(second["kl"]) > 1e-4
    assert (root / "models/grpo/adapter/adapter_model.safetensors").is_file()
    assert 0 < json.loads((root / "metrics/grpo.json").read_text(encoding="utf-8"))["trainable_share"] < 1


def test_no_critic_is_held() -> None:
    for name in algorithms.VALUES:
        params = config.validate(params_of(name), "params.yaml")
        kept_near = ["reference"] if params.grpo.kl.coefficient else []
        assert [held.engine for held in memory.models("grpo", params)] == ["policy", *kept_near, "reward"]
    lora = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "learning_rate": 1e-3}
    params = config.validate(params_of("dapo", actor_lora=lora, ema_decay=0.9), "params.yaml")
    actor, *others = memory.models("grpo", params)
    assert (actor.averages, [held.engine for held in others]) == (1, ["reward"])
