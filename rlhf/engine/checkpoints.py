"""Checkpoints of a stage under way: what a rerun goes on from. They live in the job's folder and never become outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.job import Job


def save(
    job: Job, step: int, engines: Mapping[str, DeepSpeedEngine], state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint after `step` steps; it counts once its file COMPLETE exists. The one before it is then removed.

    Args:
        engines: the DeepSpeed engines by name: weights, optimiser, scheduler.
        state: what else the loop needs, as JSON: counters, the KL coefficient, rows of the plot.
        tensors: this rank's own, by name: a moving average.
    """
    folder = job.folder / "checkpoints" / f"step-{step}"
    if job.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    if tensors:
        save_file(dict(tensors), _of_rank(folder, job))
    dist.barrier()
    if job.is_main:
        (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        (folder / "COMPLETE").touch()
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)


def load(job: Job, engines: Mapping[str, DeepSpeedEngine], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Restore the newest complete checkpoint, tensors in place; returns its state, with `step` 0 where there is none."""
    complete = [path.parent for path in (job.folder / "checkpoints").glob("step-*/COMPLETE")]
    if not complete:
        return {"step": 0}
    folder = max(complete, key=lambda path: int(path.name.removeprefix("step-")))
    for name, engine in engines.items():
        engine.load_checkpoint(str(folder), tag=name)
    if tensors:
        saved = load_file(_of_rank(folder, job))
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    job.say(f"goes on from step {state['step']}")
    return state


def _of_rank(folder: Path, job: Job) -> Path:
    return folder / f"rank-{job.rank}.safetensors"
