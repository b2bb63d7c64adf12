"""The ranks of a job: start-up, sums over them, and the rows that each one takes."""

from __future__ import annotations

import ctypes
import heapq
import os
import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from rlhf import config
from rlhf.config.operations import JobLayout
from rlhf.errors import UserError
from rlhf.job import Job

T = TypeVar("T")
# mallopt's names for what is asked of the system by itself, and what is given back to it (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def start(job: Job) -> torch.device:
    """Join the job's process group and make the arithmetic repeatable. Returns the rank's device."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch gives no types; nothing here reads memory that it has not written
    torch.manual_seed(job.seed("torch"))
    cuda = job.device == "cuda"
    if cuda:
        torch.cuda.set_device(job.local_rank)
    else:
        keep_memory()
        # DeepSpeed would compile its shared-memory collectives at the first start; a fresh machine may lack a compiler, and gloo needs none
        deepspeed.ops.__compatible_ops__[get_accelerator().create_op_builder("ShareMemCommBuilder").NAME] = False
    backend = "nccl" if cuda else "gloo"
    if not dist.is_initialized():
        _meet(job, backend)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    each = "a GPU each" if cuda else f"{torch.get_num_threads()} threads each"
    job.say(f"computes in {job.params.launch.precision} on {job.world_size} ranks, {each}")
    return device(job)


def keep_memory() -> None:
    """Keep what a step frees for the next one: glibc would give large blocks back, to be faulted in again page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems' libraries have none
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _meet(job: Job, backend: str) -> None:
    """Open the process group. Left to itself, torch would listen on every address of the machine; here it is MASTER_ADDR alone."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = socket.create_server((host, port)).detach() if job.is_main else None
    store = dist.TCPStore(host, port, job.world_size, job.is_main, default_pg_timeout, master_listen_fd=listening)
    dist.init_process_group(backend, store=store, rank=job.rank, world_size=job.world_size)


def device(job: Job) -> torch.device:
    """This rank's own."""
    return torch.device("cuda", job.local_rank) if job.device == "cuda" else torch.device("cpu")


def check_even(size: int, job: Job, name: str) -> None:
    """Check that a global batch can be dealt to the ranks without a rest.

    Raises:
        UserError: it cannot.
    """
    if size % job.world_size:
        raise UserError(
            f"{name}: a batch of {size} rows cannot be dealt evenly to {job.world_size} processes",
            remedy=f"make it a multiple of {job.world_size}, or change launch.jobs.{config.kind(job.stage)}.processes",
        )


def share(rows: Sequence[T], job: Job, name: str) -> list[T]:
    """This rank's part of a global batch, which `gather` puts together again.

    Raises:
        UserError: the batch cannot be dealt evenly to the ranks.
    """
    check_even(len(rows), job, name)
    return list(rows[job.rank :: job.world_size])


def share_tokens(
    rows: Sequence[T], size: Callable[[T], int], job: Job, name: str, *, together: Callable[[T], Hashable] | None = None
) -> list[T]:
    """This rank's part of a global batch: on each rank equally many rows, of about as many tokens, since all wait for the last.

    Args:
        size: tokens of a row.
        together: what rows have in common that stay on one rank as far as the numbers allow.

    Raises:
        UserError: the batch cannot be dealt evenly to the ranks.
    """
    check_even(len(rows), job, name)
    groups: dict[Hashable, list[int]] = {}
    for row, value in enumerate(rows):
        groups.setdefault(together(value) if together else row, []).append(row)
    sizes = [size(row) for row in rows]
    dealt: list[list[int]] = [[] for _ in range(job.world_size)]
    filled = [0] * job.world_size
    each = len(rows) // job.world_size
    for group in sorted(groups.values(), key=lambda group: -sum(sizes[row] for row in group)):
        rest = group
        while rest:
            emptiest = min((rank for rank, own in enumerate(dealt) if len(own) < each), key=filled.__getitem__)
            taken, rest = rest[: each - len(dealt[emptiest])], rest[each - len(dealt[emptiest]) :]
            dealt[emptiest] += taken
            filled[emptiest] += sum(sizes[row] for row in taken)
    return [rows[row] for row in sorted(dealt[job.rank])]


def micro_batches(rows: Sequence[T], size: Callable[[T], int], tokens: int, *, least: int = 1) -> list[list[T]]:
    """Rows in as few parts, of about as many tokens each, as keep every part within a number of tokens.

    Args:
        size: tokens of a row; one that is too large is a part by itself.
        tokens: most of a part.
        least: parts wanted at least; no more than rows.
    """
    sizes = [size(row) for row in rows]
    limit = max([tokens, *sizes])
    parts = _deal(sizes, max(least, -(-sum(sizes) // limit)))
    while max(sum(sizes[i] for i in part) for part in parts) > limit:
        parts = _deal(sizes, len(parts) + 1)
    return [[rows[i] for i in sorted(part)] for part in parts if part]


def _deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Numbers of the rows of each part: the longest row first, each to the part that has least so far."""
    parts: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, part) for part in range(count)]
    for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        held, part = filled[0]
        parts[part].append(row)
        heapq.heapreplace(filled, (held + sizes[row], part))
    return parts


def equal_micro_batches(rows: Sequence[T], size: Callable[[T], int], job: Job) -> list[list[T]]:
    """This rank's rows in micro-batches of launch.jobs.STAGE.micro_batch_tokens, on each rank equally many.

    Ranks that share a model out (ZeRO) must make each forward and backward pass together. All must call this, with equally many rows.
    """
    tokens = layout(job).micro_batch_tokens
    needed = torch.tensor(len(micro_batches(rows, size, tokens)), device=device(job))
    dist.all_reduce(needed, op=dist.ReduceOp.MAX)
    return micro_batches(rows, size, tokens, least=int(needed))


def layout(job: Job) -> JobLayout:
    return getattr(job.params.launch.jobs, config.kind(job.stage))


def own_micro_batches(batch: Sequence[T], size: Callable[[T], int], job: Job, name: str) -> list[list[T]]:
    """This rank's part of a global batch, as `share_tokens` deals it, in `equal_micro_batches`."""
    return equal_micro_batches(share_tokens(batch, size, job, name), size, job)


def sharing_micro_batches(rows: Sequence[T], prompt: Callable[[T], Sequence[int]], answer: Callable[[T], int], job: Job) -> list[list[T]]:
    """As `equal_micro_batches`, rows with the same prompt in the same one as far as it holds them: a forward pass reads that once.

    Args:
        prompt, answer: token ids of a row's prompt; tokens of its answer.
    """
    tokens = layout(job).micro_batch_tokens

    def size(unit: Sequence[T]) -> int:
        return len(prompt(unit[0])) + sum(map(answer, unit))

    open_units: dict[tuple[int, ...], list[T]] = {}
    units: list[list[T]] = []
    for row in rows:
        key = tuple(prompt(row))
        if key not in open_units or size([*open_units[key], row]) > tokens:
            open_units[key] = []
            units.append(open_units[key])
        open_units[key].append(row)
    needed = torch.tensor(len(micro_batches(units, size, tokens)), device=device(job))
    dist.all_reduce(needed, op=dist.ReduceOp.MAX)
    while len(units) < needed:  # another rank has more of them
        largest = max((unit for unit in units if len(unit) > 1), key=size)
        units.append([largest.pop() for _ in range(len(largest) // 2)])
    return [[row for unit in part for row in unit] for part in micro_batches(units, size, tokens, least=int(needed))]


def block(rows: Sequence[T], job: Job, name: str) -> list[T]:
    """As `share`, but rows that follow each other stay together.

    Raises:
        UserError: the batch cannot be dealt evenly to the ranks.
    """
    check_even(len(rows), job, name)
    each = len(rows) // job.world_size
    return list(rows[job.rank * each : (job.rank + 1) * each])


def join(rows: Sequence[T], job: Job) -> list[T]:
    """The rows of all ranks' blocks, in their order, on each rank."""
    parts: list[list[T]] = [[] for _ in range(job.world_size)]
    dist.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]


def add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add numbers to sums of the same names, in double precision and where they are: reading each would have a GPU waited for."""
    for name, value in more.items():
        sums[name] = value.detach().double() + sums.get(name, 0.0)


def sum_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Each number added up over the ranks."""
    total = torch.stack(list(values.values()))
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def gather(rows: Sequence[T], job: Job) -> list[T]:
    """The rows that every rank took as ``all_rows[rank::world_size]``, back in their order, on each rank."""
    ranks = job.world_size
    parts: list[list[T]] = [[] for _ in range(ranks)]
    dist.all_gather_object(parts, list(rows))
    return [parts[i % ranks][i // ranks] for i in range(sum(map(len, parts)))]
