"""Two sides in turn: a program in a process of its own (or in several, one per rank), which makes one step whenever it is told to.

So each side has its own settings of torch and its own memory, loads once, and a slow moment of the machine strikes both.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.job import Job
from rlhf.launcher.command import OPENMP

Pause = Callable[[], None]  # called by a program when it is ready, and after each of its steps: waits until the next one is wanted
SECONDS_TO_END = 10
PRELOADED = ("deepspeed", "trl", "transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt", "rlhf.stages.ppo")


@dataclass(frozen=True)
class Step:
    """What a step cost; of ranks, what it cost rank 0."""

    seconds: float
    processor: float  # seconds of processor time: what can be compared where other work is done beside
    memory: int  # bytes: the largest that the process has held since its start


class Stopwatch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self.seconds, self.processor = time.perf_counter(), time.process_time()

    def stop(self) -> Step:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return Step(time.perf_counter() - self.seconds, time.process_time() - self.processor, memory)


class Side:
    """A program under way: `program(pause, *arguments)`, a function of a module. The first step is to get ready.

    Args:
        ranks: processes that are told their place in a process group, as stages need it; None: one that is told nothing.
    """

    def __init__(self, program: Callable[..., None], *arguments: Any, threads: int = 1, ranks: int | None = None) -> None:
        context = _context()
        self.connection, far = context.Pipe()
        descriptor, name = tempfile.mkstemp(prefix="rlhf-bench-", suffix=".log")
        os.close(descriptor)
        self.log = Path(name)
        port = free_port()
        places = [{}] if ranks is None else [place_of(rank, ranks, port) for rank in range(ranks)]
        self.processes = [
            context.Process(target=_serve, args=(far, self.log, place, threads, program, arguments), daemon=True) for place in places
        ]
        for process in self.processes:
            process.start()
        far.close()

    def step(self) -> Step:
        """Have it make one step.

        Raises:
            RuntimeError: the program ended; its last lines are told.
        """
        try:
            self.connection.send(None)
            return self.connection.recv()
        except (EOFError, OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            raise RuntimeError("\n".join(["a side ended before its time:", *lines])) from None

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.connection.close()
        self.processes[0].join(SECONDS_TO_END)
        for process in self.processes:
            process.kill()
            process.join()
        self.log.unlink()


def _serve(connection: Connection, log: Path, place: dict[str, str], threads: int, program: Callable[..., None], arguments: tuple) -> None:
    """In a process of its own."""
    import torch

    from rlhf.engine.distributed import keep_memory

    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= place
    torch.set_num_threads(threads)
    keep_memory()  # as stages do: it is not what is compared
    if place.get("RANK", "0") != "0":
        connection.close()
        program(lambda: None, *arguments)
        return
    connection.recv()
    watch = Stopwatch()

    def pause() -> None:
        nonlocal watch
        connection.send(watch.stop())
        try:
            connection.recv()
        except EOFError:  # no further step is wanted
            sys.exit()
        watch = Stopwatch()

    program(pause, *arguments)


@cache
def _context() -> Any:
    """Processes are forked from one that has loaded the packages once, which takes seconds."""
    os.environ |= {
        **OPENMP,
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    forkserver.set_forkserver_preload(list(PRELOADED))
    return multiprocessing.get_context("forkserver")


def place_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a process of a group finds in its environment."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ----------------------------------------------------------------------------------------------------------------- ours


@dataclass(frozen=True)
class PacedJob(Job):
    """A job that pauses where a stage has logged a step."""

    pause: Pause = field(default=lambda: None)

    def log(self, step: int, total: int, metrics: Any) -> None:
        super().log(step, total, metrics)
        self.pause()


def paced_job(pause: Pause, root: Path, stage: str) -> PacedJob:
    """A job whose stage also pauses before its first step."""
    from rlhf import config
    from rlhf.engine.steps import Steps

    begin = Steps.__iter__

    def begin_when_wanted(steps: Steps) -> Iterator[int]:
        pause()
        return begin(steps)

    Steps.__iter__ = begin_when_wanted  # type: ignore[method-assign]  # in this process alone
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = PacedJob(stage, config.load(root / "params.yaml"), root, root / "runs" / stage, "cpu", rank, ranks, rank, pause=pause)
    job.folder.mkdir(parents=True, exist_ok=True)
    return job


def stage(pause: Pause, root: Path, name: str) -> None:
    """A stage as it is: its `main`, with all that it does in a step, checked, logged and written."""
    from importlib import import_module

    import_module(f"rlhf.stages.{name}").main(paced_job(pause, root, name))
