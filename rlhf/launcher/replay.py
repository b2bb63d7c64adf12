"""Training from stored answers alone: a look for faults in training, which samples nothing and publishes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf.errors import UserError
from rlhf.launcher import command, processes
from rlhf.launcher.console import Console
from rlhf.launcher.launch import held, ready
from rlhf.locks import lock

STAGES = ("ppo", "grpo")  # that learn from their own answers


def replay(stage: str, root: Path, rollouts: Path, package: str = "rlhf.stages") -> int:
    """Run a stage's loop on the answers of one stored step, over and over; the exit code.

    What it logs is in runs/replay/STAGE/metrics.jsonl; what it would have published is deleted.

    Raises:
        UserError: the stage samples nothing, there is no such file, an input is missing, or it took too long.
    """
    root, rollouts = root.resolve(), rollouts.resolve()
    if stage not in STAGES:
        raise UserError(f"stage {stage} learns from no answers of its own", remedy=f"`--from` is for {' and '.join(STAGES)}")
    if not rollouts.is_file():
        raise UserError(
            f"{rollouts}: no such file", remedy=f"give runs/{stage}/FINGERPRINT/rollout.pt, which the stage writes in each step"
        )
    params, _ = ready(root, stage)
    folder = root / "runs" / "replay" / stage
    settings = params.launch
    try:
        with processes.stoppable(), lock(root, f"replay-{stage}", refuse=f"stage {stage} is being replayed already"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            gpus = command.find_gpus(settings.accelerator)
            with held(root, stage, params, gpus) as numbers, Console(stage, folder / "log.txt") as console:
                words = command.command(stage, f"{package}.{stage}", params, numbers)
                environment = command.environment(stage, params, root, folder, "cuda" if gpus else "cpu")
                environment["RLHF_ROLLOUTS"] = str(rollouts)
                code = processes.run(words, root, environment, settings.timeout_minutes * 60, console.show)
                if code:
                    console.explain(code)
            for name in ("out", "checkpoints", "hidden"):
                shutil.rmtree(folder / name, ignore_errors=True)
    except subprocess.TimeoutExpired:
        raise UserError(f"stage {stage} was stopped after launch.timeout_minutes", remedy="raise it and run again") from None
    except processes.Stopped as stop:
        return 128 + stop.number
    print(f"{stage}: nothing was published; each step is in {os.path.relpath(folder / 'metrics.jsonl', root)}", file=sys.stderr, flush=True)
    return code
