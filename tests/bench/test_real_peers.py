"""What bench/real_model/peers.py says of stages beside TRL's trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stage_runs import make_workspace, run, tiny_params

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the bench writes of each stage, after some steps of tiny models in fp32."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[dev]'")
    root = tmp_path_factory.mktemp("peers")
    raw = tiny_params()
    for stage in ("sft", "reward", "dpo"):
        raw[stage] |= {"epochs": 1, "batch_size": 8}
        raw[stage]["optimizer"] |= {"warmup_ratio": 0.2, "schedule": "cosine", "weight_decay": 0.1}
    make_workspace(root, raw, pairs=160)
    run(root, "base", "sft", "reward", "dpo")
    command = [sys.executable, "bench/real_model/peers.py", str(root), "--threads", "1", "--output", str(root / "rows.json")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return {row["stage"]: row for row in json.loads((root / "rows.json").read_text(encoding="utf-8"))}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_trls_trainers_come_to_our_weights(rows: dict[str, dict[str, Any]], stage: str) -> None:
    assert rows[stage]["apart"] < 1e-3
    assert rows[stage]["difference"] == pytest.approx(0, abs=1e-3)
