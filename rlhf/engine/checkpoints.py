"""Checkpoints of a stage under way: what a rerun goes on from. They live in the job's folder and never become outputs.

A checkpoint is a folder step-N:

    ENGINE/             weights, optimiser, schedule, loss scale: DeepSpeed's own form, shared out among the ranks as in training
    state.json          step, layout, and what else the loop needs
    rank-R.pt           generators of random numbers of rank R
    NAME-R.safetensors  an average of weights (ema, reference), in as many parts as the model is held in
    COMPLETE-R          size and SHA-256 of rank R's share of the files above, which are on the disk

It is whole once the COMPLETE of every rank exists. They are written in the background, while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file, save_file

from rlhf.engine import universal
from rlhf.engine.ema import Ema
from rlhf.errors import UserError, full_disk
from rlhf.job import Job

MARKER = "COMPLETE"

_background = ThreadPoolExecutor(max_workers=1)
_sealing: list[Future[None]] = []


def save(
    job: Job,
    step: int,
    engines: Mapping[str, DeepSpeedEngine],
    state: Mapping[str, Any],
    quality: float,
    averages: Mapping[str, Ema] = MappingProxyType({}),
) -> None:
    """Write a checkpoint after `step` steps, and remove those that need not stay. All ranks must call it.

    Args:
        engines: the DeepSpeed engines by name.
        state: what else the loop needs, as JSON: counters, the KL coefficient, rows of the plot.
        quality: the higher, the better; the best checkpoint is kept besides the newest.
        averages: of weights, by name.

    Raises:
        UserError: the disk is full; the checkpoints before this one stay.
        OSError: this one, or the one before it, cannot be written.
    """
    settle()
    folder = _root(job) / f"step-{step}"
    if job.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    try:
        for name, engine in engines.items():
            engine.save_checkpoint(str(folder), tag=name, save_latest=False)
        torch.save(_random_states(), folder / f"rank-{job.rank}.pt")
        for name, average in averages.items():
            if job.rank < average.parts:
                save_file(average.average, folder / f"{name}-{job.rank}.safetensors")
        if job.is_main:
            layout = {"ranks": job.world_size, "zero": {name: engine.zero_optimization_stage() for name, engine in engines.items()}}
            content = {"step": step, "quality": quality, "layout": layout, "loop": state}
            (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")
    except Exception as error:
        full = full_disk(error, folder)  # asked before the half of it makes room again
        shutil.rmtree(folder, ignore_errors=True)
        if full:
            raise full from error
        raise
    dist.barrier()
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and MARKER not in path.name)
    _sealing.append(_background.submit(_seal, job, folder, paths[job.rank :: job.world_size]))


def settle() -> None:
    """Wait until what this rank has saved is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    while _sealing:
        _sealing.pop().result()


def load(job: Job, engines: Mapping[str, DeepSpeedEngine], averages: Mapping[str, Ema] = MappingProxyType({})) -> dict[str, Any]:
    """Restore the newest whole checkpoint; returns its state, with `step` 0 where there is none. All ranks must call it.

    Where the number of ranks or the ZeRO stage has changed since, DeepSpeed's universal checkpoint cuts the shares anew: the loss goes on
    where it was, though no longer to the same bytes.

    Raises:
        UserError: it was written without ZeRO and is to be read with it, or the reverse.
    """
    folder = _newest(job)
    if folder is None:
        return {"step": 0}
    saved = _state(folder)
    layout = saved["layout"]
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
    for name, average in averages.items():
        average.restore([load_file(part) for part in _parts_to_read(folder, name, average)])
    if (own := folder / f"rank-{job.rank}.pt").exists():
        _restore_random_states(torch.load(own, weights_only=False))
    moved = f", on {job.world_size} ranks instead of {layout['ranks']}" if job.world_size != layout["ranks"] else ""
    job.say(f"goes on from step {saved['step']}{moved}")
    return {"step": saved["step"], **saved["loop"]}


def _root(job: Job) -> Path:
    return job.folder / "checkpoints"


def _by_step(job: Job) -> list[Path]:
    """All checkpoints, the newest first, whole or not."""
    return sorted(_root(job).glob("step-*"), key=lambda path: -int(path.name.removeprefix("step-")))


def _parts_to_read(folder: Path, name: str, average: Ema) -> list[Path]:
    """This rank's own part of an average; all parts where it is cut differently now."""
    parts = sorted(folder.glob(f"{name}-*.safetensors"), key=lambda path: int(path.stem.removeprefix(f"{name}-")))
    return [parts[average.part]] if len(parts) == average.parts else parts


# ---------------------------------------------------------------------------------------------------------- whole or not


def _seal(job: Job, folder: Path, files: list[Path]) -> None:
    """Bring a rank's share of the files to the disk, then list them; rank 0 removes checkpoints that need not stay."""
    listed = {str(path.relative_to(folder)): _measure(path) for path in files}
    beside = folder / f".{MARKER}-{job.rank}"
    with beside.open("w", encoding="utf-8") as file:
        json.dump(listed, file)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(folder / f"{MARKER}-{job.rank}")
    _sync_folder(folder)
    if job.is_main:
        _prune(job)


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
    if not _is_sealed(folder):
        return "cut off while it was written"
    for marker in folder.glob(f"{MARKER}-*"):
        try:
            listed = dict(json.loads(marker.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return f"{marker.name} cannot be read"
        for name, expected in listed.items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if _measure(path) != expected:
                return f"{name} has changed"
    return None


def _is_sealed(folder: Path) -> bool:
    """Whether every rank came to the end of its part; its files may have changed since."""
    try:
        ranks = _state(folder)["layout"]["ranks"]
    except (FileNotFoundError, ValueError):
        return False
    return all((folder / f"{MARKER}-{rank}").exists() for rank in range(ranks))


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _prune(job: Job) -> None:
    """Remove all but the newest launch.checkpoints.keep, and the best."""
    folders = [folder for folder in _by_step(job) if _is_sealed(folder)]
    if not folders:
        return
    keep = {*folders[: job.params.launch.checkpoints.keep], max(folders, key=lambda folder: _state(folder)["quality"])}
    for folder in set(folders) - keep:
        (folder / f"{MARKER}-0").unlink()  # first: a kill on the way leaves one that is seen to be cut off
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
