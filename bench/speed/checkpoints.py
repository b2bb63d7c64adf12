"""What checkpoints cost: the training loops of sft and reward on the sandbox, with a checkpoint every 20 steps and with none.

python bench/speed/checkpoints.py WORKSPACE     a folder in which the sandbox's stages prepare and base have run
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import yaml

from rlhf import config
from rlhf.job import Job, read_lines

REPOSITORY = Path(__file__).resolve().parents[2]
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
    for loop in (sft, reward):
        seconds = {NEVER: float("inf"), EVERY: float("inf")}
        for every in (NEVER, EVERY) * rounds:
            seconds[every] = min(seconds[every], run(loop, workspace.resolve(), steps, every))
        without, with_them = seconds[NEVER], seconds[EVERY]
        found = f"{without:.2f} s without checkpoints, {with_them:.2f} s with one every {EVERY}: {with_them / without - 1:+.1%}"
        print(f"{loop.__name__}, {steps} steps: {found}")


def run(loop: Callable[[Job], float], workspace: Path, steps: int, every: int) -> float:
    """Seconds of one run of a loop, loading and saving of the model aside."""
    raw = yaml.safe_load((REPOSITORY / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    name = loop.__name__
    rows = len(read_lines(workspace / f"data/prepared/{name}.jsonl"))
    raw[name] |= {"epochs": steps * raw[name]["batch_size"] / rows, "checkpoint_every": every}
    with tempfile.TemporaryDirectory(prefix="rlhf-checkpoints-", dir=workspace) as place:
        job = Job(name, config.validate(raw, "presets/sandbox.yaml"), workspace, Path(place), "cpu", 0, 1, 0)
        return loop(job)


def sft(job: Job) -> float:
    from rlhf.engine.distributed import start
    from rlhf.models.policy import load_policy
    from rlhf.models.tokenizer import load_tokenizer
    from rlhf.stages.language_model import fit
    from rlhf.stages.sft import read_rows

    start(job)
    model, tokenizer = load_policy(job.input("models/base"), "fp32"), load_tokenizer(job.input("models/base"))
    rows, _ = read_rows(job, tokenizer)
    started = time.perf_counter()
    fit(job, model, rows, job.params.sft)
    return time.perf_counter() - started


def reward(job: Job) -> float:
    from rlhf.engine.distributed import start
    from rlhf.models.tokenizer import load_tokenizer
    from rlhf.stages.reward import fit, new_scalar, read_pairs

    start(job)
    tokenizer = load_tokenizer(job.input("models/base"))
    pairs, _ = read_pairs(job, tokenizer, "data/prepared/reward.jsonl", job.params.reward.max_tokens)
    scalar = new_scalar(job, tokenizer, "head")
    started = time.perf_counter()
    fit(job, scalar, pairs, job.params.reward)
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
