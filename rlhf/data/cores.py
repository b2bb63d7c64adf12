"""Work dealt to the cores that there are. Results come in the order of the tasks, so that they do not depend on the number of cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from types import TracebackType
from typing import TypeVar

from rlhf.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4  # tasks beyond one for each core that are begun, or done and not yet taken: what is in memory at once


class Cores:
    """A process for each core, of one thread, for as long as it is open; one core or one task has none."""

    def __init__(self) -> None:
        self.count = len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def in_order(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results of a function of a module, in the order of the tasks. Tasks are taken as they are needed.

        Raises:
            UserError: a process was killed.
        """
        coming = iter(tasks)
        first = list(islice(coming, 2))
        if self._pool is None or len(first) < 2:
            yield from map(function, chain(first, coming))
            return
        waiting = deque[tuple[Task, Future[Result]]]()
        for task in chain(first, coming):
            waiting.append((task, self._pool.submit(function, task)))
            if len(waiting) > self.count + AHEAD:
                yield _result(function, *waiting.popleft())
        while waiting:
            yield _result(function, *waiting.popleft())

    def __enter__(self) -> Cores:
        if self.count > 1:
            # forked at once, before this process has threads, as those of pyarrow
            self._pool = ProcessPoolExecutor(self.count, mp_context=multiprocessing.get_context("fork"), initializer=_begin)
            self._pool.submit(int).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _result(function: Callable[[Task], Result], task: Task, future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        what = "a process of this stage was killed; mostly the system does that when memory runs out"
        raise UserError(what, remedy="free memory, or run it on fewer cores (`taskset --cpu-list 0 rlhf run`)") from None
    except Exception:
        return function(task)  # what cannot be sent, or is nested too deeply for it; an error of the function's own comes again


def _begin() -> None:
    """In a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all; the parent tidies up
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
