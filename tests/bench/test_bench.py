"""The speed benchmarks compare equal work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_the_reference_loop_computes_what_stage_ppo_computes() -> None:
    done = subprocess.run([sys.executable, BENCH / "speed/ppo_step.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prepare_writes_the_same_bytes_on_one_core_and_on_all() -> None:
    done = subprocess.run([sys.executable, BENCH / "speed/prepare.py", "--rows", "3000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{BENCH.parent}: the same bytes each time\n")
