"""Faults of bench/faults/run.py that come to registered versions: decided on by two at once, checked elsewhere, with a changed byte."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import psutil

from bench.faults.cases import Case, flip
from bench.faults.disturbed import Bench, Row
from bench.faults.workspace import Workspace, until

# one more version of the same model: its evaluation has a line more
REGISTER = """
from pathlib import Path
from rlhf import config, registry
root = Path.cwd()
with (root / "metrics/evaluate.json").open("a") as file:
    file.write("\\n")
print(registry.register(root, config.load(root / "params.yaml")).number)
"""


def finished(bench: Bench, name: str) -> Workspace:
    """A workspace in which a run has registered version 1 and made it champion, all stages coming out of the run cache."""
    place = bench.fresh(name)
    bench.done.give_runs(place, ["sft", "ppo"])
    place.run("rlhf", "run")
    return place


def call(place: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=place.root, env=place.environment, capture_output=True, text=True, check=False)


def two_promotions(bench: Bench, name: str) -> list[Row]:
    """Two people promote different versions, both having seen the same champion: the registry's lock is held until both are at it."""
    place = finished(bench, name)
    for _ in range(2):
        place.run(sys.executable, "-c", REGISTER)
    began = time.monotonic()
    lock = place.root / "runs" / "locks" / "registry.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        at_it = [place.start("rlhf", "promote", str(number)) for number in (2, 3)]
        until(lambda: all(any(Path(one.path) == lock for one in process.open_files()) for process in _of(place, at_it)), "nobody waits")
    codes = sorted(process.wait() for process in at_it)
    wrong = [] if codes == [0, 1] else [f"exit codes {codes}"]
    wrong += [] if place.said().count("is champion by now") == 1 else ["nobody was told"]
    said = call(place, "rlhf", "models").stdout
    wrong += [] if said.count("promoted: version") == 2 and said.count(" champion ") == 1 else [said]
    return [Row(name, "", not wrong, "", time.monotonic() - began, "; ".join(wrong))]


def _of(place: Workspace, started: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    ids = {process.pid for process in started}
    return [process for process in place.processes() if process.pid in ids]


def elsewhere(bench: Bench, name: str) -> list[Row]:
    """A clone elsewhere with data pulled from the remote: version 1 is verified; after a byte changed in its cache it is not, and named."""
    place, began = finished(bench, name), time.monotonic()
    remote = place.folder / "remote"
    place.run("dvc", "remote", "add", "--local", "--default", "here", str(remote))
    place.run("dvc", "push")
    clone = place.folder / "elsewhere"
    place.run("git", "clone", "--quiet", "--branch", "assistant-v1", str(place.root), str(clone / "clone"))
    other = Workspace(clone)
    other.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{place.root}/mlruns/mlflow.db"
    other.run("dvc", "remote", "add", "--local", "--default", "here", str(remote))
    other.run("dvc", "pull")
    done = call(other, "rlhf", "verify", "1")
    wrong = [] if done.returncode == 0 else [done.stderr]
    seconds = time.monotonic() - began
    model = (other.root / "models" / "ppo" / "model.safetensors").read_bytes()
    (kept,) = (path for path in other.root.glob(".dvc/cache/files/md5/*/*") if path.read_bytes() == model)
    flip(kept)
    kept.chmod(0o444)
    done = call(other, "rlhf", "verify", "1")
    named = "models/ppo/model.safetensors has other bytes in the DVC cache"
    wrong += [] if done.returncode and named in done.stderr else [f"a changed byte is not named: {done.stdout[-200:]}{done.stderr}"]
    return [Row(name, "", not wrong, "", seconds, "; ".join(wrong))]


def retrained(bench: Bench, name: str) -> list[Row]:
    """`rlhf verify 1 --retrain`: everything once more in a fresh checkout, to the same bytes."""
    place, began = finished(bench, name), time.monotonic()
    done = call(place, "rlhf", "verify", "1", "--retrain")
    wrong = [] if done.returncode == 0 else [(done.stdout + done.stderr)[-600:]]
    return [Row(name, "all", not wrong, "; ".join(done.stdout.splitlines()[-2:-1]), time.monotonic() - began, "; ".join(wrong))]


CASES: dict[str, Case] = {
    "two promotions at once": two_promotions,
    "verify elsewhere": elsewhere,
    "verify --retrain": retrained,
}
