"""Reward functions in processes of their own, and services, each failing in every way that it can; with real processes and servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.config.rewards import FunctionReward, HttpReward
from rlhf.errors import UserError
from rlhf.rewards.scoring import Checkers, check_failures, first_failures

FUNCTIONS = """
import dataclasses, os, random, signal, subprocess, sys, time

@dataclasses.dataclass
class Weights:
    each: float = 2.0

def weighs(answer):
    return Weights().each * len(answer) * (Weights.__annotations__["each"] is float)

def goes_away(answer): return os.chdir("/") or 1
def is_here(answer): return os.path.exists("my.py")

def letters(answer):
    return len(answer)

def all_of_it(prompt, answer, reference, columns, factor):
    return factor * (len(prompt) + len(answer) + reference + columns["more"])

def raises(answer):
    return 1 / 0 if answer == "bad" else 1

def hangs(answer):
    if answer == "bad":
        open("pid", "w").write(str(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid))
        while True: pass
    return 1

def nan(answer): return float("nan") if answer == "bad" else 1
def none(answer): return None if answer == "bad" else 1
def text(answer): return "1" if answer == "bad" else 1
def leaves(answer): return sys.exit(0) if answer == "bad" else 1
def ends(answer): return os._exit(3) if answer == "bad" else 1
def killed(answer): return os.kill(os.getpid(), signal.SIGKILL) if answer == "bad" else 1

def prints(answer):
    print('{"score": 7}', flush=True)
    os.write(1, b'{"score": 7}\\n')
    os.system("echo 7")
    return 1 if sys.stdin.read() == "" else 0

def forks(answer):
    return 2 if os.fork() else 7

def draws(answer): return random.random()

def starts_one(answer):
    return float(subprocess.run(["echo", answer], capture_output=True).stdout)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "my.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("def score(answer) return 1")
    return tmp_path


def function(of: str, **changes: Any) -> FunctionReward:
    values = {"name": "it", "kind": "function", "weight": 1.0, "function": f"my.py:{of}", "options": {}, "sources": None}
    limits = {"right_from": None, "seconds": 2.0, "failure_score": -3.0, "max_failed_share": 0.5}
    return FunctionReward.model_validate(values | limits | changes)


def asked(count: int) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": "Hi"}]} for _ in range(count)]


@contextmanager
def opened(root: Path, *entries: Any) -> Iterator[Checkers]:
    checkers = Checkers(entries, root)
    try:
        yield checkers
    finally:
        checkers.close()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "ZeroDivisionError: division by zero"),
        ("hangs", "it took longer than its time limit"),
        ("nan", "it gave nan"),
        ("none", "it gave None"),
        ("text", "it gave '1'"),
        ("leaves", "SystemExit: 0"),
        ("ends", "its process ended with exit code 3"),
        ("killed", "its process was killed by SIGKILL"),
    ],
)
def test_what_fails_on_one_answer_gets_the_stated_score(root: Path, name: str, told: str) -> None:
    answers = ["good", "bad", "good", "good", "good"]
    with opened(root, function(name)) as checkers:
        found = checkers.score(asked(5), answers)["it"]
        again = checkers.score(asked(5), answers)["it"]
    assert [outcome.score for outcome in found] == [1, -3, 1, 1, 1] == [outcome.score for outcome in again]
    assert told in first_failures({"it": found})["it"]
    check_failures([function(name)], {"it": found}, "stage ppo, step 1")
    with pytest.raises(
        UserError, match=r"stage ppo, step 1: reward 'it' \(my.py:\w+\) failed on 1 of 5 answers, more than max_failed_share"
    ):
        check_failures([function(name, max_failed_share=0.1)], {"it": found}, "stage ppo, step 1")


def test_nothing_is_left_of_a_function_that_hangs(root: Path) -> None:
    with opened(root, function("hangs", seconds=2.0)) as checkers:
        started = time.monotonic()
        assert checkers.score(asked(1), ["bad"])["it"][0].score == -3
        assert time.monotonic() - started < 10
        workers = [worker.process.pid for worker in checkers.functions.workers]
    started_by_it = int((root / "pid").read_text())
    assert not psutil.pid_exists(started_by_it) or psutil.Process(started_by_it).status() == psutil.STATUS_ZOMBIE
    assert not any(psutil.pid_exists(pid) for pid in workers)


@pytest.mark.parametrize(("name", "score"), [("prints", 1), ("forks", 2)])
def test_what_a_function_prints_and_forks_disturbs_nothing(root: Path, name: str, score: float, capfd: pytest.CaptureFixture[str]) -> None:
    with opened(root, function(name)) as checkers:
        assert [outcome.score for outcome in checkers.score(asked(6), list("abcdef"))["it"]] == [score] * 6
    assert capfd.readouterr() == ("", "")


def test_a_file_may_have_classes_of_its_own(root: Path) -> None:
    (root / "later.py").write_text("from __future__ import annotations\n" + FUNCTIONS.replace(" is float", ' == "float"'))
    with opened(root, function("weighs"), function("weighs", name="later", function="later.py:weighs")) as checkers:
        found = checkers.score(asked(1), ["abc"])
    assert (found["it"][0].score, found["later"][0].score) == (6, 6)


def test_a_function_that_changes_its_folder_disturbs_no_other(root: Path) -> None:
    with opened(root, function("goes_away"), function("is_here", name="other")) as checkers:
        checkers.functions.processes = 1
        assert [outcome.score for outcome in checkers.score(asked(2), ["a", "b"])["other"]] == [1, 1]


def test_a_function_may_start_processes(root: Path) -> None:
    with opened(root, function("starts_one")) as checkers:
        assert checkers.score(asked(1), ["4.5"])["it"][0].score == 4.5


def test_a_function_gets_prompt_answer_reference_columns_and_options(root: Path) -> None:
    row = asked(1)[0] | {"reference": 10, "columns": {"more": 100}}
    with opened(root, function("all_of_it", options={"factor": 2})) as checkers:
        assert checkers.score([row], ["abc"])["it"][0].score == 2 * (1 + 3 + 10 + 100)


def test_the_order_is_that_of_the_rows_whatever_the_number_of_processes(root: Path) -> None:
    answers = ["x" * (number * 7 % 31) for number in range(60)]
    found = []
    for processes in (1, 5):
        with opened(root, function("letters"), function("draws", name="lot")) as checkers:
            checkers.functions.processes = processes
            found.append(checkers.score(asked(60), answers))
    assert [outcome.score for outcome in found[0]["it"]] == [len(answer) for answer in answers]
    assert found[0] == found[1]
    assert len({outcome.score for outcome in found[0]["lot"]}) == len(set(answers))


def test_an_entry_scores_answers_to_its_sources_alone(root: Path) -> None:
    rows = [row | {"source": name} for row, name in zip(asked(3), ("sums", "other", "sums"), strict=True)]
    with opened(root, function("letters", sources=["sums"])) as checkers:
        found = checkers.score(rows, ["a", "bb", "ccc"])["it"]
    assert [(outcome.score, outcome.asked) for outcome in found] == [(1, True), (0, False), (3, True)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"function": "broken.py:score"}, "broken.py:score cannot be used: SyntaxError"),
        ({"function": "my.py:nowhere"}, "AttributeError: my.py has no function nowhere"),
        ({"function": "gone.py:score"}, "No such file"),
        ({"function": "length"}, "missing a required argument: 'most'"),
        ({"function": "match", "options": {"case": True}}, "unexpected keyword argument 'case'"),
    ],
)
def test_a_function_that_cannot_be_called_is_an_error(root: Path, change: dict[str, Any], told: str) -> None:
    with opened(root, function("letters", **change)) as checkers, pytest.raises(UserError, match=told):
        checkers.score(asked(1), ["a"])


def test_votes(root: Path) -> None:
    with opened(root, function("letters", name="sum", function="math"), function("letters")) as checkers:
        assert checkers.votes("sum", asked(3), ["It is 0.50", "\\boxed{\\frac{1}{2}}", "none"])[2] == ""
        assert checkers.votes("it", asked(2), ["The Sea.", "sea"]) == ["sea", "sea"]


def test_workers_end_with_a_stage_that_is_killed(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.rewards.test_scoring import *\n"
        f"c = Checkers([function('hangs', seconds=1000.0)], Path({str(root)!r}))\n"
        "c.functions.processes = 1; c.score(asked(1), ['bad'])"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 30
    workers: list[psutil.Process] = []
    while not any("sleep" in child.name() for child in psutil.Process(stage.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(stage.pid).children()
    sleeping = [child for child in psutil.Process(stage.pid).children(recursive=True) if child.name() == "sleep"]
    os.kill(stage.pid, signal.SIGKILL)
    stage.wait()
    psutil.wait_procs(workers, 5)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    for process in sleeping:  # the function gave it a session of its own
        process.kill()


# -------------------------------------------------------------------------------------------------------------- services


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose replies a function makes of the request and its number; its address and the requests that came."""
    import json

    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(content | {"token": self.headers["Authorization"]})
            status, body = reply(content, len(requests))
            self.send_response(status)
            self.end_headers()
            for part in body if isinstance(body, Iterator) else [body if isinstance(body, bytes) else json.dumps(body).encode()]:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score", requests
    finally:
        server.shutdown()
        server.server_close()


def service(url: str, **changes: Any) -> HttpReward:
    values = {"name": "it", "kind": "http", "weight": 1.0, "url": url, "sources": None, "right_from": None, "batch_size": 4}
    limits = {"seconds": 60.0, "failure_score": -3.0, "max_failed_share": 0.5, "retries": 0}
    return HttpReward.model_validate(values | limits | changes)


def lengths(content: dict[str, Any], _number: int) -> tuple[int, Any]:
    return 200, {"scores": [len(row["answer"]) for row in content["rows"]]}


def test_a_service_scores_in_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "secret\n")
    with serving(lengths) as (url, requests), opened(root, service(url)) as checkers:
        found = checkers.score(asked(10), ["x" * number for number in range(10)])["it"]
    assert [outcome.score for outcome in found] == list(range(10))
    assert sorted(len(request["rows"]) for request in requests) == [2, 4, 4]
    assert requests[0]["token"] == "Bearer secret"
    assert requests[0]["rows"][0].keys() == {"prompt", "answer", "reference", "columns"}


def test_a_column_that_holds_no_number_reaches_the_service(root: Path) -> None:
    row = asked(1)[0] | {"columns": {"level": float("nan")}}
    with serving(lengths) as (url, requests), opened(root, service(url)) as checkers:
        assert checkers.score([row], ["abc"])["it"][0].score == 3
    assert requests[0]["rows"][0]["columns"]["level"] != requests[0]["rows"][0]["columns"]["level"]


def slowly() -> Iterator[bytes]:
    for _ in range(40):
        time.sleep(0.05)
        yield b" "


@pytest.mark.parametrize(
    ("reply", "told", "requests_made"),
    [
        ((200, {"scores": [1, 2]}), "it gave 2 scores for 3 answers", 1),
        ((200, {"score": 1}), "is not", 1),
        ((200, b"<html>"), "is not", 1),
        ((404, {}), "answered with status 404", 1),
        ((503, {}), "answered with status 503", 2),
        ((200, "slow"), "took longer than 0.5 s", 2),
        ((200, "dripping"), "took longer than 0.5 s", 2),
    ],
)
def test_a_service_that_does_wrong_gets_the_stated_score(root: Path, reply: Any, told: str, requests_made: int) -> None:
    def answer(_content: dict[str, Any], _number: int) -> tuple[int, Any]:
        if reply[1] == "slow":
            time.sleep(0.8)
        return reply[0], slowly() if reply[1] == "dripping" else reply[1]

    seconds = 0.5 if "0.5 s" in told else 60.0
    with serving(answer) as (url, requests), opened(root, service(url, retries=1, seconds=seconds)) as checkers:
        found = checkers.score(asked(3), ["a", "b", "c"])["it"]
        assert [outcome.score for outcome in found] == [-3] * 3
        assert told in (found[0].failure or "")
        assert len(requests) == requests_made


def test_a_number_that_is_none_fails_by_itself(root: Path) -> None:
    reply = b'{"scores": [1, NaN, "2", 4, 1%s]}' % (b"0" * 400)
    with serving(lambda *_: (200, reply)) as (url, _), opened(root, service(url, batch_size=5)) as checkers:
        assert [outcome.score for outcome in checkers.score(asked(5), list("abcde"))["it"]] == [1, -3, -3, 4, -3]


def test_a_service_that_comes_back_is_asked_again(root: Path) -> None:
    def answer(content: dict[str, Any], number: int) -> tuple[int, Any]:
        return (503, {}) if number == 1 else lengths(content, number)

    with serving(answer) as (url, _), opened(root, service(url, retries=1)) as checkers:
        assert checkers.score(asked(1), ["abc"])["it"][0].score == 3


def test_a_service_that_is_away(root: Path) -> None:
    with serving(lengths) as (url, _):
        pass
    with opened(root, service(url, retries=1)) as checkers:
        found = checkers.score(asked(2), ["a", "b"])
    with pytest.raises(UserError, match=r"reward 'it' \(http://127.0.0.1:\d+/score\) failed on 2 of 2 answers.* cannot be reached"):
        check_failures([service(url)], found, "stage ppo, step 3")
