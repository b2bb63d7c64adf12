"""What bench/learning/peers.py says of runs beside TRL's trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bench.learning.peers import ALGORITHMS, main, over_runs
from bench.real_model.same_answers import beside
from rlhf.models.policy import load_policy
from rlhf.models.saving import save_model
from tests.stage_runs import make_workspace, set_params
from tests.stages.test_grpo import params_of
from tests.stages.test_sharding import make_models


def row(algorithm: str, seed: int, difference: float) -> dict[str, Any]:
    ends = {f"ci95_{side}": [0.8, 0.9] for side in ("ours", "trl")}
    gold = {"sft": 0.5, "ours": 0.9, "trl": 0.9 - difference, **ends, "difference": difference, "ci95": [-0.1, 0.1]}
    speed = {"name": f"{algorithm}, seed {seed}", "ours": 80.0, "peer": 20.0, "ratio": 4.0, "processor_ratio": 4.1}
    return {"algorithm": algorithm, "seed": seed, "gold": gold, "speed": speed}


def test_the_interval_over_runs_is_students() -> None:
    rows = [row("grpo", 1, 0.01), row("grpo", 2, 0.03), row("rloo", 1, -0.01), row("rloo", 2, -0.05)]
    # t of one degree of freedom, 12.706, times a standard error of 0.01, 0.02, and, of the seeds' means 0 and -0.01, 0.005
    assert over_runs(rows) == [
        "grpo: gold +0.020 above TRL's (-0.107 … +0.147 over 2 seeds)",
        "rloo: gold -0.030 above TRL's (-0.284 … +0.224 over 2 seeds)",
        "all: gold -0.005 above TRL's (-0.069 … +0.059 over 2 seeds)",
    ]


def test_runs_of_several_calls_are_counted_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{seed}.json" for seed in (1, 2)]
    for seed, path in enumerate(paths, start=1):
        path.write_text(json.dumps({"rows": [row("rloo", seed, 0.01 * seed)]}), encoding="utf-8")
    main(earlier=paths, output=tmp_path / "all.json")
    said = capsys.readouterr().out
    assert "rloo, seed 2" in said
    assert "all: gold +0.015 above TRL's (-0.049 … +0.079 over 2 seeds)" in said
    assert len(json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))["rows"]) == 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_the_same_answers_trls_trainers_end_at_our_weights(algorithm: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[dev]'")
    raw = params_of(algorithm, steps=4, epochs=1, entropy_coefficient=0.0)
    raw["grpo"]["actor"] |= {"learning_rate": 3e-3, "epsilon": 1e-5, "warmup_ratio": 0.25}
    raw["grpo"]["kl"]["coefficient"] = 1.0  # the policy is hardly off in so few steps
    make_workspace(tmp_path, raw, pairs=120)
    make_models(tmp_path, tokenizer)
    policy = load_policy(tmp_path / "models/sft", "fp32")
    with torch.no_grad():  # some answers end, some are cut off
        policy.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4
    save_model(policy, tokenizer, tmp_path / "models/sft")
    set_params(tmp_path, raw)
    assert beside(tmp_path, tmp_path / "both", 1, [])["apart"] < 1e-4
