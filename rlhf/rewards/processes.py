"""Processes that call reward functions, with a time limit that holds whatever a function does."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rlhf.config.rewards import FunctionReward
from rlhf.errors import UserError

START_SECONDS = 120  # until a process has imported the functions
# what the ranks of a stage know of each other is none of a function's business, nor are their GPUs
HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHOWN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}


class Worker:
    """One process, and what it is at."""

    def __init__(self, entries: Mapping[str, FunctionReward], root: Path, kept: Path | None) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in HIDDEN} | SHOWN
        given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, given))  # they start in another folder
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhf.rewards.worker", str(os.getpid())],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.writing, self.reading = self.process.stdin, self.process.stdout
        os.set_blocking(self.reading.fileno(), False)
        self.received = b""
        self.call: int | None = None  # number of the call that it is at
        self.ready = False
        functions = {name: {"function": entry.function, "options": entry.options} for name, entry in entries.items()}
        self.send({"root": str(root), "kept": kept and str(kept), "entries": functions}, START_SECONDS)

    def send(self, asked: Mapping[str, Any], seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        with suppress(BrokenPipeError):  # it has ended, which reading tells
            self.writing.write(json.dumps(asked).encode() + b"\n")

    def reply(self) -> dict[str, Any] | None:
        """What it says, once that is whole.

        Raises:
            EOFError: it has ended.
        """
        part = self.reading.read(1 << 16)
        if part == b"":
            raise EOFError
        self.received += part or b""
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return None
        self.received = rest
        return json.loads(line)

    def end(self) -> str:
        """Kill it and all that it started; how it had ended, where it had."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):  # some may have left its group
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0 if self.process.poll() is None else None)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.writing.close()
        self.reading.close()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Functions:
    """All reward functions of a run, called by several processes. What comes out does not depend on how many there are."""

    def __init__(self, entries: Sequence[FunctionReward], root: Path, processes: int, kept: Path | None = None) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.root, self.processes, self.kept = root, processes, kept
        self.workers: list[Worker] = []

    def call(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What each call gave, in their order: `score` or `vote`, or `error`, why it gave none.

        Args:
            calls: each with `entry`, `vote` (whether that is asked for), and what the function takes.

        Raises:
            UserError: a function cannot be loaded.
        """
        replies: dict[int, dict[str, Any]] = {}
        waiting = deque(range(len(calls)))
        while len(self.workers) < min(self.processes, len(calls)):
            self.workers.append(Worker(self.entries, self.root, self.kept))
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.reading, selectors.EVENT_READ, worker)
                self._next(worker, calls, waiting)
            while len(replies) < len(calls):
                busy = [worker for worker in self.workers if worker.call is not None or not worker.ready]
                pause = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
                readable = {key.data for key, _ in selector.select(pause)}
                for worker in busy:
                    said = self._said(worker, readable)
                    if said is None:
                        continue
                    if worker.call is not None:
                        replies[worker.call] = said
                    if said.pop("ended", False):
                        selector.unregister(worker.reading)
                        ended = self._replace(worker, said)
                        selector.register(ended.reading, selectors.EVENT_READ, ended)
                        continue
                    if not worker.ready:
                        self._check_start(said)
                        worker.ready = True
                    worker.call = None
                    self._next(worker, calls, waiting)
        return [replies[number] for number in range(len(calls))]

    def _next(self, worker: Worker, calls: Sequence[Mapping[str, Any]], waiting: deque[int]) -> None:
        if worker.ready and waiting:
            worker.call = waiting.popleft()
            call = calls[worker.call]
            worker.send(call, self.entries[call["entry"]].seconds)

    def _said(self, worker: Worker, readable: set[Worker]) -> dict[str, Any] | None:
        """A reply, or that it ended, or that its time is up; None where it is still at it."""
        if worker in readable:
            try:
                return worker.reply()
            except EOFError:
                return {"error": "its process ended", "ended": True}
        return {"error": "it took too long", "ended": True} if time.monotonic() >= worker.deadline else None

    def _replace(self, worker: Worker, said: dict[str, Any]) -> Worker:
        """Another process for one that has ended, or must."""
        late = said["error"] == "it took too long"
        how = worker.end()
        if not worker.ready:
            why = f"took more than {START_SECONDS} s" if late else f"was {how}" if how.startswith("killed") else how
            functions = ", ".join(entry.function for entry in self.entries.values())
            raise UserError(f"rewards: the process that loads {functions} {why}", remedy="see what the functions' files do on import")
        said["error"] = "it took longer than its time limit (seconds)" if late else f"its process was {how}".replace("was ended", "ended")
        fresh = Worker(self.entries, self.root, self.kept)
        self.workers[self.workers.index(worker)] = fresh
        return fresh

    def _check_start(self, said: Mapping[str, Any]) -> None:
        if "error" in said:
            entry = self.entries[said["entry"]]
            last = said["error"].strip().splitlines()[-1]
            print(said["error"], flush=True)
            raise UserError(f"rewards: {entry.name}: {entry.function} cannot be used: {last}", remedy="correct its file, or its options")

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []
