"""Whether the stages can be started as section launch says: GPUs, port, nodes, batches for the processes, room on the disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhf.config import Params, kind
from rlhf.errors import UserError
from rlhf.launcher import command, space
from rlhf.launcher.space import GIB, text
from rlhf.plan.findings import Findings
from rlhf.workspace import precision

HOST = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
BATCHES = {
    "base": ("base.batch_size",),
    "sft": ("sft.batch_size",),
    "reward": ("reward.batch_size",),
    "awac": ("awac.batch_size",),
    "ppo": ("ppo.rollout_batch_size", "ppo.mini_batch_size", "ppo.mixture_batch_size"),
    "grpo": ("grpo.rollout_batch_size", "grpo.mini_batch_size", "grpo.mixture_batch_size"),
    "dpo": ("dpo.batch_size",),
    "best_of_n": ("best_of_n.batch_size",),
    "rrhf": ("rrhf.batch_size",),
    "round": ("iterative.dpo.batch_size",),
    "evaluate": ("evaluate.judge.batch_size",),
}
SIDE_BY_SIDE = ("sft", "reward")


def check(root: Path, stages: Sequence[str], params: Params, findings: Findings) -> tuple[list[int] | None, int]:
    """Check what section launch asks for.

    Returns:
        Bytes of each GPU, none where the stages run on the CPU, None where those that params ask for are missing; and the number of nodes.
    """
    launch, nodes = params.launch, 1
    gpus: list[int] | None = None
    trained = [stage for stage in stages if stage != "prepare"]
    with findings.collecting():
        gpus = sizes(command.find_gpus(launch.accelerator))
    if launch.hostfile:
        with findings.collecting():
            nodes = len(hosts(root / launch.hostfile, max((getattr(launch.jobs, kind(stage)).processes for stage in trained), default=0)))
    for stage in trained:
        processes = getattr(launch.jobs, kind(stage)).processes
        if gpus and not launch.hostfile and processes > len(gpus):
            what = f"params.yaml: launch.jobs.{kind(stage)}.processes is {processes}, but there are {len(gpus)} GPUs here"
            findings.problems.append(UserError(what, remedy=f"set it to at most {len(gpus)}"))
        findings.problems += _uneven(stage, params, processes * nodes)
    if launch.port:
        with findings.collecting():
            command.choose_port(launch.port)
        _check_shared_port(trained, params, len(gpus or ()), findings)
    if launch.precision == "fp16" and gpus == [] and not _computes_in_half():
        what = "launch.precision is fp16, in which this machine's processor cannot train"
        findings.problems.append(UserError(what, remedy="set it to fp32 or bf16"))
    if doubt := precision.doubt(launch):
        findings.notes.append(doubt)
    return gpus, nodes


def sizes(gpus: Sequence[int]) -> list[int]:
    """Bytes of each GPU."""
    if not gpus:
        return []
    import torch

    # torch counts those that are visible from 0 on
    return [torch.cuda.get_device_properties(place).total_memory for place in range(len(gpus))]


def _computes_in_half() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def hosts(path: Path, processes: int) -> dict[str, int]:
    """The nodes of a hostfile, with the slots of each.

    Raises:
        UserError: it is missing, a line is wrong, a node has too few slots, or what starts processes on several is not installed.
    """
    key = f"params.yaml: launch.hostfile {path}"
    if not path.is_file():
        raise UserError(f"{key}: no such file", remedy="write it, or set launch.hostfile to null")
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = HOST.fullmatch(line.strip())
        if not match or match[1] in found:
            wrong = f"{match[1]} stands there twice" if match else f"{line.strip()!r} is not of the form NAME slots=NUMBER"
            raise UserError(f"{key}, line {number}: {wrong}", remedy="write a line such as `node1 slots=8` for each node")
        found[match[1]] = int(match[2])
    if not found:
        raise UserError(f"{key} names no node", remedy="write a line such as `node1 slots=8` for each node")
    short = [name for name, slots in found.items() if slots < processes]
    if short:
        what = f"{key}: {', '.join(short)} has fewer slots than the {processes} processes of a stage (launch.jobs)"
        raise UserError(what, remedy="lower launch.jobs.STAGE.processes, or give it more slots")
    if len(found) > 1 and not shutil.which("pdsh"):
        raise UserError(
            f"{key} names {len(found)} nodes, and `pdsh`, which starts processes there, is not installed", remedy="install pdsh"
        )
    return found


def _uneven(stage: str, params: Params, processes: int) -> list[UserError]:
    """Batches that cannot be dealt to the processes without a rest."""
    found = []
    for key in BATCHES.get(kind(stage), ()):
        size: object = params
        for part in key.split("."):
            size = getattr(size, part, None)  # a given base has no batches
        idle = (stage == "evaluate" and not params.trains_judge) or ("mixture" in key and not params.answering.mixture_coefficient)
        if isinstance(size, int) and size % processes and not idle:
            what = f"{key}: a batch of {size} rows cannot be dealt evenly to {processes} processes"
            found.append(UserError(what, remedy=f"make it a multiple of {processes}, or change launch.jobs.{kind(stage)}.processes"))
    return found


def _check_shared_port(stages: Sequence[str], params: Params, gpus: int, findings: Findings) -> None:
    """Two stages that run side by side cannot share a port; with too few GPUs for both, one waits for the other."""
    wanted = sum(getattr(params.launch.jobs, stage).processes for stage in SIDE_BY_SIDE)
    if set(SIDE_BY_SIDE) <= set(stages) and (not gpus or wanted <= gpus):
        what = f"launch.port is {params.launch.port}, but {' and '.join(SIDE_BY_SIDE)} run side by side, and each needs a port of its own"
        findings.problems.append(UserError(what, remedy="set launch.port to 0, which takes a free one"))


def check_disk(root: Path, stages: Sequence[str], params: Params, base: int, findings: Findings) -> None:
    """Hold what the stages write at most, one after the other, against the room on the disk.

    Args:
        base: weights of the base model.
    """
    kept, most, widest = 0, 0, ""
    for stage in stages:
        needed = space.estimate(root, stage, params, base)
        there = sum(path.stat().st_size for path in (root / "runs" / stage).rglob("*") if path.is_file())
        at = max(0, kept + needed.total - there)
        if at >= most:
            most, widest = at, f"in stage {stage}: {needed.line}" if needed.total else ""
        kept += needed.models + needed.records
    free, spare = shutil.disk_usage(root).free, int(params.operations.spare_gib * GIB)
    findings.seen.append(("disk", f"{text(most)} written at most at a time, {text(free)} free"))
    if most + spare > free:
        what = f"the stages would write {text(most)} at most at a time ({widest}, and {text(kept)} of models and records in all), "
        what += f"{text(spare)} are to stay free (operations.spare_gib), and the disk of {root} has {text(free)} left"
        findings.problems.append(
            UserError(what, remedy="make room (`rlhf gc --dry-run` lists what nothing needs), or lower launch.checkpoints.keep")
        )
