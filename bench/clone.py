"""A scratch clone of the repository, in which the benchmarks run its own commands."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import typer
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS_BETWEEN_SAMPLES = 0.5
SHARE_OF_SAMPLES = 0.02  # of a core, at most: the system counts pages for each
LINES_SHOWN = 20


class Clone:
    """The repository at HEAD in a folder of its own, or as an earlier benchmark left it there.

    Its commands use this interpreter's packages and the clone's code.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "clone", folder / "log.txt"
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_", "RLHF_"))}
        self.environment = outside | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "PREFECT_HOME": str(folder / "prefect"),
            "DVC_SITE_CACHE_DIR": str(folder / "dvc"),
            "DO_NOT_TRACK": "true",
        }
        if not self.root.exists():
            subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(self.root)], check=True)

    def run(self, *words: str) -> tuple[float, float]:
        """Run a command to its end; its seconds and its peak memory in GiB.

        Raises:
            typer.Exit: it failed; its last lines are shown.
        """
        started, peak = time.perf_counter(), 0
        with self.log.open("ab") as log:
            process = subprocess.Popen(words, cwd=self.root, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                begun = time.thread_time()
                peak = max(peak, memory(process.pid))
                time.sleep(max(SECONDS_BETWEEN_SAMPLES, (time.thread_time() - begun) / SHARE_OF_SAMPLES))
        if process.returncode:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
            print("\n".join([*lines, f"`{' '.join(words)}` failed with exit code {process.returncode}"]), file=sys.stderr)
            raise typer.Exit(1)
        return time.perf_counter() - started, peak / 2**30

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights of every model and of the entries of dvc.lock, by path."""
        weights = {str(path.relative_to(self.root)): path.read_bytes() for path in sorted(self.root.glob("models/*/model.safetensors"))}
        # stages that ran side by side stand in dvc.lock in the order in which they ended
        locked = json.dumps(yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8")), sort_keys=True)
        return {name: hashlib.sha256(content).hexdigest() for name, content in (weights | {"dvc.lock": locked.encode()}).items()}


def memory(pid: int) -> int:
    """Bytes that a process and all its descendants hold."""
    parent = psutil.Process(pid)
    total = 0
    for process in (parent, *parent.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended meanwhile
    return total


def evaluation(root: Path, policy: str = "ppo") -> dict[str, Any]:
    """What stage evaluate measured, on one level.

    Args:
        policy: the stage that made the policy.
    """
    found = json.loads((root / "metrics" / "evaluate.json").read_text(encoding="utf-8"))
    gold, result = found["gold"], dict[str, Any]()
    if found["reward_model"]:
        result["reward_accuracy"] = found["reward_model"]["accuracy"]
    if accuracy := found.get("accuracy"):
        result |= {"accuracy_sft": accuracy["sft"]["value"], "accuracy": accuracy[policy]["value"], "accuracy_low": accuracy["ci95"][0]}
    return {
        **result,
        "gold_sft": gold["sft"],
        "gold": gold[policy],
        "gold_difference": gold["difference"],
        "ci95_low": gold["ci95"][0],
        "ci95_high": gold["ci95"][1],
        "win_rate": found["win_rate"]["value"],
        "perplexity_sft": found["perplexity"]["sft"],
        "perplexity_ratio": found["perplexity"]["ratio"],
        "kl": found["kl"],
        "eos_rate": found["eos_rate"][policy],
        "answer_tokens": found["answer_tokens"][policy],
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def cell(value: Any) -> str:
    """A number in a table."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
