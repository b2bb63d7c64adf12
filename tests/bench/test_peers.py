"""What bench/learning/peers.py says of runs beside TRL's trainers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.learning.peers import over_runs

SCRIPT = Path(__file__).resolve().parents[2] / "bench/learning/peers.py"


def row(algorithm: str, seed: int, difference: float) -> dict[str, Any]:
    ends = {f"ci95_{side}": [0.8, 0.9] for side in ("ours", "trl")}
    gold = {"sft": 0.5, "ours": 0.9, "trl": 0.9 - difference, **ends, "difference": difference, "ci95": [-0.1, 0.1]}
    speed = {"name": f"{algorithm}, seed {seed}", "ours": 80.0, "peer": 20.0, "ratio": 4.0, "processor_ratio": 4.1}
    return {"algorithm": algorithm, "seed": seed, "gold": gold, "speed": speed}


def test_the_interval_over_runs_is_students() -> None:
    rows = [row("grpo", 1, 0.01), row("grpo", 2, 0.03), row("rloo", 1, -0.01), row("rloo", 2, -0.03)]
    # two runs: t 12.706, the standard error that of 0.0141 over √2; four: t 3.182, 0.0258 over 2
    assert over_runs(rows) == [
        "grpo: gold +0.020 above TRL's (-0.107 … +0.147 over 2 runs)",
        "rloo: gold -0.020 above TRL's (-0.147 … +0.107 over 2 runs)",
        "all: gold +0.000 above TRL's (-0.041 … +0.041 over 4 runs)",
    ]


def test_runs_of_several_calls_are_counted_together(tmp_path: Path) -> None:
    words: list[str | Path] = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps({"rows": [row("rloo", seed, 0.01 * seed)]}), encoding="utf-8")
        words += ["--stored", path]
    done = subprocess.run([sys.executable, SCRIPT, *words, "--output", tmp_path / "all.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rloo, seed 2" in done.stdout
    assert "all: gold +0.015 above TRL's (-0.049 … +0.079 over 2 runs)" in done.stdout
    assert len(json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))["rows"]) == 2
