"""What a training process holds, part by part, and what gradient_checkpointing and micro_batch_tokens cost: stage sft on a random model.

python bench/speed/memory.py                       of SmolLM2's shape, bf16: two minutes on two cores
python bench/speed/memory.py --model llama --precision fp32

Each row is a process of its own, some steps of 16 dialogues. Parts are counted from the tensors themselves; `kept` is what the forward pass
keeps for the backward pass. `rest` is the most that the process ever held less all of these: Python and its libraries, what operations hold
for a moment, the copies at the start, and gaps that the allocator keeps.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import deepspeed
import torch
import typer
from rich.table import Table
from torch import Tensor

from bench.speed.report import console
from bench.speed.sides import free_port, place_of
from bench.speed.workload import NEVER, OPTIMIZER, jobs, workspace
from rlhf import config
from rlhf.job import Job
from rlhf.launcher.command import OPENMP
from rlhf.stages import sft

STEPS, ROWS, ANSWER_TOKENS = 4, 16, 128
PARTS = ("before", "weights", "master weights", "moments", "gradients", "kept", "rest", "in all")
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "micro_batch_tokens 1024": {"tokens": 1024},
    "micro_batch_tokens 512": {"tokens": 512},
    "gradient_checkpointing": {"checkpointing": True},
}


def main(
    model: Annotated[str, typer.Option(help="Of bench/speed/workload.py.")] = "llama-135m",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Print MiB of each part, and seconds of a step."""
    os.environ |= {**OPENMP, "DS_ACCELERATOR": "cpu"}
    shown = Table(title=f"Stage sft, {model}, {precision}, {ROWS} rows a step: MiB, seconds of a step", title_justify="left")
    for heading in ("", *PARTS, "seconds"):
        shown.add_column(heading, justify="right" if heading else "left")
    context = multiprocessing.get_context("spawn")
    for name, setting in SETTINGS.items():
        with workspace(model, None, STEPS * ROWS, ANSWER_TOKENS, params(**setting), precision=precision) as place:
            result = context.Queue()
            process = context.Process(target=measure, args=(place.root, threads, result))
            process.start()
            process.join()
            if process.exitcode:
                raise typer.Exit(1)
            found = result.get()
        print(name, json.dumps(found), flush=True)
        shown.add_row(name, *(f"{found[part] / 2**20:.0f}" for part in PARTS), f"{found['seconds']:.2f}")
    console().print(shown)


def params(tokens: int = 4096, *, checkpointing: bool = False) -> dict[str, dict[str, Any]]:
    stage = {"epochs": 1.0, "batch_size": ROWS, "max_tokens": 512, "optimizer": OPTIMIZER, "checkpoint_every": NEVER}
    return {"sft": stage, "launch": {"jobs": jobs(tokens=tokens), "gradient_checkpointing": checkpointing}}


@dataclass
class Kept:
    """Bytes that forward passes keep: each storage once, from the time that it is kept until nobody holds it."""

    weights: set[int]
    now: dict[int, int] = field(default_factory=dict)
    most: int = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.most = max(self.most, sum(self.now.values()))
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        """The backward pass has begun: what the next forward pass keeps is counted anew."""
        self.now = {}
        return tensor


@dataclass(frozen=True)
class TimedJob(Job):
    times: list[float] = field(default_factory=list)

    def log(self, step: int, total: int, metrics: Any) -> None:
        self.times.append(time.perf_counter())


def measure(root: Path, threads: int, result: Any) -> None:
    """In a process of its own: run the stage and count."""
    os.environ |= place_of(0, 1, free_port())
    os.dup2(os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT), 1)
    torch.set_num_threads(threads)
    job = TimedJob("sft", config.load(root / "params.yaml"), root, root / "runs", "cpu", 0, 1, 0)
    job.folder.mkdir()
    engines: list[Any] = []
    make = deepspeed.initialize

    def watched(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        engines.append(made[0])
        kept.weights.update(parameter.untyped_storage().data_ptr() for parameter in made[0].module.parameters())
        return made

    deepspeed.initialize = watched
    kept = Kept(set())
    before = held()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        sft.main(job)
    (engine,) = engines
    weights = list(engine.module.parameters())
    optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"] if all(p is not weight for weight in weights)]
    parts = {
        "before": before,
        "weights": size(weights),
        "master weights": size(masters),
        "moments": size(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)),
        # those of each weight; in half precision all of them in fp32 as well, when the optimiser steps
        "gradients": size(weights) + size(masters),
        "kept": kept.most,
    }
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = statistics.median(after - first for first, after in zip(job.times, job.times[1:], strict=False))
    result.put({**parts, "rest": most - sum(parts.values()), "in all": most, "seconds": seconds})


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    typer.run(main)
