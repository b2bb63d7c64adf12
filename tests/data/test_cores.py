"""Work on several cores: in order, a little at a time, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlhf.data.cores import AHEAD, Cores
from rlhf.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=[1, 2, 5])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cores]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(request.param)))
    with Cores() as made:
        yield made


def slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 5))
    return number**2


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def inverse(number: int) -> float:
    return 1 / number


def depth_of(nested: list) -> int:
    depth = 0
    while nested:
        depth, nested = depth + 1, nested[0]
    return depth


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_results_come_in_order_and_tasks_are_taken_as_needed(cores: Cores) -> None:
    taken: list[int] = []
    found: list[int] = []

    def tasks() -> Iterator[int]:
        while len(taken) < 100:
            taken.append(len(taken))
            yield taken[-1]

    for result in cores.in_order(slow_square, tasks()):
        assert len(taken) - len(found) <= cores.count + AHEAD + 1
        found.append(result)
    assert found == [number**2 for number in range(100)]
    assert list(cores.in_order(slow_square, [])) == []
    assert list(cores.in_order(slow_square, [3])) == [9]


def test_what_cannot_be_sent_is_done_here(cores: Cores) -> None:
    depths = [1, 700, 2]
    assert list(cores.in_order(depth_of, map(nested, depths))) == depths
    assert list(cores.in_order(bool, [1, threading.Lock(), 0])) == [True, True, False]
    with pytest.raises(ZeroDivisionError):
        list(cores.in_order(inverse, [1, 0, 2]))


def test_a_killed_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(UserError, match="a process of this stage was killed"), Cores() as cores:
        list(cores.in_order(die, range(10)))


PROGRAM = """
import os, time
from rlhf.data.cores import Cores

if __name__ == "__main__":
    os.sched_getaffinity = lambda pid: {0, 1}
    with Cores() as cores:
        for _ in cores.in_order(time.sleep, [0, 0, 60, 60]):
            print("going", flush=True)
"""


def test_none_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 2
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
