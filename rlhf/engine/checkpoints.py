"""Checkpoints of a stage under way: what a rerun goes on from. They live in the job's folder and never become outputs.

A checkpoint is a folder step-N, whole once its file COMPLETE exists, which lists size and SHA-256 of every other file:

    ENGINE/             weights, optimiser, schedule, loss scale: DeepSpeed's own form, shared out among the ranks as in training
    state.json          step, layout, and what else the loop needs
    rank-R.pt           generators of random numbers of rank R
    ema-R.safetensors   the moving average, in as many parts as the model is held in
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file, save_file

from rlhf.engine import universal
from rlhf.engine.ema import Ema
from rlhf.errors import UserError
from rlhf.job import Job

MARKER = "COMPLETE"


def save(
    job: Job, step: int, engines: Mapping[str, DeepSpeedEngine], state: Mapping[str, Any], quality: float, ema: Ema | None = None
) -> None:
    """Write a checkpoint after `step` steps, and remove those that need not stay. All ranks must call it.

    Args:
        engines: the DeepSpeed engines by name.
        state: what else the loop needs, as JSON: counters, the KL coefficient, rows of the plot.
        quality: the higher, the better; the best checkpoint is kept besides the newest.
    """
    folder = _root(job) / f"step-{step}"
    if job.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    torch.save(_random_states(), folder / f"rank-{job.rank}.pt")
    if ema and job.rank < ema.parts:
        save_file(ema.average, folder / f"ema-{job.rank}.safetensors")
    if job.is_main:
        layout = {"ranks": job.world_size, "zero": {name: engine.zero_optimization_stage() for name, engine in engines.items()}}
        (folder / "state.json").write_text(json.dumps({"step": step, "layout": layout, **state}), encoding="utf-8")
    dist.barrier()
    _seal(job, folder, quality)
    if job.is_main:
        _prune(job)
    dist.barrier()


def load(job: Job, engines: Mapping[str, DeepSpeedEngine], ema: Ema | None = None) -> dict[str, Any]:
    """Restore the newest whole checkpoint; returns its state, with `step` 0 where there is none. All ranks must call it.

    Where the number of ranks or the ZeRO stage has changed since, DeepSpeed's universal checkpoint cuts the shares anew: the loss goes on
    where it was, though no longer to the same bytes.

    Raises:
        UserError: it was written without ZeRO and is to be read with it, or the reverse.
    """
    folder = _newest(job)
    if folder is None:
        return {"step": 0}
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    layout = state.pop("layout")
    for name, engine in engines.items():
        before, now = layout["zero"][name], engine.zero_optimization_stage()
        if bool(before) != bool(now):
            raise UserError(
                f"{folder}: written with zero_stage {before}, which zero_stage {now} cannot read",
                remedy=f"set zero_stage back under launch.engines, or delete {_root(job)} to begin anew",
            )
        if before and (before, layout["ranks"]) != (now, job.world_size):
            universal.load(job, folder, name, engine)
        else:
            engine.load_checkpoint(str(folder), tag=name)
    if ema:
        ema.restore([load_file(part) for part in _parts_to_read(folder, ema)])
    if (own := folder / f"rank-{job.rank}.pt").exists():
        _restore_random_states(torch.load(own, weights_only=False))
    moved = f", on {job.world_size} ranks instead of {layout['ranks']}" if job.world_size != layout["ranks"] else ""
    job.say(f"goes on from step {state['step']}{moved}")
    return state


def _root(job: Job) -> Path:
    return job.folder / "checkpoints"


def _by_step(job: Job) -> list[Path]:
    """All checkpoints, the newest first, whole or not."""
    return sorted(_root(job).glob("step-*"), key=lambda path: -int(path.name.removeprefix("step-")))


def _parts_to_read(folder: Path, ema: Ema) -> list[Path]:
    """This rank's own part of the moving average; all parts where it is cut differently now."""
    parts = sorted(folder.glob("ema-*.safetensors"), key=lambda path: int(path.stem.removeprefix("ema-")))
    return [parts[ema.part]] if len(parts) == ema.parts else parts


# ---------------------------------------------------------------------------------------------------------- whole or not


def _seal(job: Job, folder: Path, quality: float) -> None:
    """Bring every file to the disk, the ranks sharing the work, and list them in the marker."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found: list[dict[str, Any]] = [{}] * job.world_size
    dist.all_gather_object(found, {str(path.relative_to(folder)): _measure(path) for path in paths[job.rank :: job.world_size]})
    if job.is_main:
        files = {name: measured for part in found for name, measured in part.items()}
        beside = folder / f".{MARKER}"
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"quality": quality, "files": files}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(folder / MARKER)
        _sync_folder(folder)


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _newest(job: Job) -> Path | None:
    """The newest checkpoint that is whole; those that are not are named and removed. Rank 0 looks, and tells the others."""
    chosen: list[Path | None] = [None]
    if job.is_main:
        for folder in _by_step(job):
            fault = _fault(folder)
            if fault is None:
                chosen = [folder]
                break
            job.say(f"checkpoint {folder.name} is not whole ({fault}): it is removed, and the one before it is used")
            shutil.rmtree(folder)
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None: nothing."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "cut off while it was written"
    except (ValueError, KeyError, TypeError):
        return f"{MARKER} cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or _measure(path) != expected:
            return f"{name} has changed"
    return None


def _prune(job: Job) -> None:
    """Remove all but the newest launch.checkpoints.keep, and the best."""
    folders = [folder for folder in _by_step(job) if (folder / MARKER).exists()]
    quality = {folder: json.loads((folder / MARKER).read_text(encoding="utf-8"))["quality"] for folder in folders}
    keep = {*folders[: job.params.launch.checkpoints.keep], max(folders, key=quality.__getitem__)}
    for folder in set(folders) - keep:
        (folder / MARKER).unlink()  # first: a kill on the way leaves one that is seen to be cut off
        shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------------- random states


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
