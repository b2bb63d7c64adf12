"""What checkpoints cost: stage sft on the sandbox's model, with a checkpoint every 20 steps and with none.

python bench/checkpoints.py WORKSPACE     a folder in which the sandbox's stages prepare and base have run
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
EVERY, NEVER = 20, 10**6


def main(
    workspace: Annotated[Path, typer.Argument(help="Where models/base and data/prepared are.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of a run.")] = 200,
    rounds: Annotated[int, typer.Option(help="Runs of each kind, in turns; the fastest counts, as other work only slows.")] = 2,
) -> None:
    """Print the seconds of the training loop without and with checkpoints, and the share that they cost."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
    }
    seconds = {NEVER: float("inf"), EVERY: float("inf")}
    for every in (NEVER, EVERY) * rounds:
        seconds[every] = min(seconds[every], run(workspace.resolve(), steps, every))
    without, with_them = seconds[NEVER], seconds[EVERY]
    print(f"{steps} steps: {without:.2f} s without checkpoints, {with_them:.2f} s with one every {EVERY}: {with_them / without - 1:+.1%}")


def run(workspace: Path, steps: int, every: int) -> float:
    """Seconds of the loop of one run, loading and saving of the model aside."""
    from rlhf import config
    from rlhf.engine.distributed import start
    from rlhf.job import Job
    from rlhf.models.policy import load_policy
    from rlhf.models.tokenizer import load_tokenizer
    from rlhf.stages.language_model import fit

    raw = yaml.safe_load((REPOSITORY / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    rows = [([5] * 60, [1] * 60)] * (steps * raw["sft"]["batch_size"])  # about as long as the sandbox's dialogues
    raw["sft"] |= {"epochs": 1.0, "checkpoint_every": every}
    with tempfile.TemporaryDirectory(prefix="rlhf-checkpoints-", dir=workspace) as place:
        job = Job("sft", config.validate(raw, "presets/sandbox.yaml"), workspace, Path(place), "cpu", 0, 1, 0)
        start(job)
        model = load_policy(workspace / "models/base", "fp32")
        pad_id = load_tokenizer(workspace / "models/base").pad_token_id
        started = time.perf_counter()
        fit(job, model, rows, job.params.sft, pad_id)
        return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
