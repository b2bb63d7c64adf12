"""The workspaces in which bench/faults/run.py plays its cases: made once, copied for each, watched from outside, compared at the end."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import yaml
from mlflow.tracking import MlflowClient

from bench.clone import Clone

# rows, sizes and steps of seconds, checkpoints every few steps, and gates that let such a model through
SMALL = [
    *("base.vocab_size=400", "base.hidden_size=64", "base.intermediate_size=64", "base.heads=4", "base.kv_heads=2", "base.epochs=0.3"),
    *("data.sources.0.rows=400", "data.sources.1.rows=400", "data.sources.2.rows=400", "data.sources.3.rows=300"),
    *("sft.epochs=10", "reward.epochs=1", "ppo.steps=24", "ppo.rollout_batch_size=16", "ppo.mini_batch_size=8"),
    *("ppo.max_answer_tokens=16", "ppo.mixture_batch_size=4", "sft.checkpoint_every=20", "ppo.checkpoint_every=4"),
    *("evaluate.prompts=30", "evaluate.pairs=30", "evaluate.texts=8", "evaluate.bootstrap_samples=100", "evaluate.shown=2"),
    *("promote.min_gold_difference=-1", "promote.min_win_rate=0", "promote.min_reward_accuracy=0", "promote.max_kl=1000"),
    *("promote.max_perplexity_ratio=1000", "promote.min_eos_rate=0", "promote.max_answer_tokens=1000", "launch.accelerator=cpu"),
    *(f"launch.jobs.{stage}.threads=1" for stage in ("base", "sft", "reward", "ppo", "evaluate")),
    "operations.spare_gib=0",  # some cases give it a small disk
]
DISTURBED = ("sft", "ppo")  # the stages that cases disturb; those before them are done, those after them come out of DVC's run cache
MARK = "RLHF_FAULTS"  # the variable by which all processes of a workspace are known
LONGEST_STOP = 60  # seconds in which every process of a stopped run has to be gone; one that still imports looks afterwards
PATIENCE = 600  # seconds after which a case is given up

# how a process of a run is known by its command line
VICTIMS: dict[str, Callable[[list[str]], bool]] = {
    "rank": lambda words: _after(words, "-m").startswith("rlhf.stages."),
    "deepspeed": lambda words: _after(words, "-m").startswith("deepspeed.launcher.launch"),
    "launcher": lambda words: _program(words) == "rlhf" and "launch" in words,
    "dvc": lambda words: _program(words) == "dvc",
    "flow": lambda words: (_program(words) == "rlhf" and words[-1] == "run") or _after(words, "-m") == "prefect.engine",
    "serve": lambda words: _program(words) == "rlhf" and "serve" in words,
    "worker": lambda words: _program(words) == "prefect" and "worker" in words,
    "prefect": lambda words: (_program(words) == "prefect" and "server" in words) or "prefect.server.api.server:create_app" in words,
    "mlflow": lambda words: (_program(words) == "mlflow" and "server" in words) or "mlflow.server.fastapi_app:app" in words,
}


class LostError(Exception):
    """A case does not come to its end."""


class Workspace(Clone):
    """A workspace with the processes that run in it. All of them are known by a variable of their environment."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)
        self.folder = folder
        self.environment[MARK] = str(folder)
        self.repeated: list[str] = []  # stages that had to be trained once more, because what they had made was destroyed

    def copy(self, folder: Path) -> Workspace:
        """The same once more, elsewhere; MLflow starts anew, as its database holds the paths of this one."""
        folder.mkdir(parents=True)
        subprocess.run(["cp", "-a", str(self.root), str(folder / "clone")], check=True)
        shutil.rmtree(folder / "clone" / "mlruns", ignore_errors=True)
        return Workspace(folder)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; its lines go to the workspace's log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                words, cwd=self.root, env=self.environment | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    # ------------------------------------------------------------------------------------------------------ processes

    def processes(self) -> list[psutil.Process]:
        """All that was started in this workspace and is alive, with all that those started."""
        return [process for process in psutil.process_iter() if self._is_own(process)]

    def _is_own(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def find(self, victim: str) -> list[psutil.Process]:
        """Its processes that play this part, the oldest first."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if VICTIMS[victim](process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def send(self, victim: str, number: signal.Signals) -> None:
        found = self.find(victim)
        if not found:
            raise LostError(f"no {victim} is running")
        with suppress(psutil.NoSuchProcess):
            found[0].send_signal(number)

    def kill_all(self) -> None:
        """A power cut: no process has time for anything, nor for noticing that another one is gone."""
        found = self.processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        while left := self.processes():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def gone(self) -> None:
        """Wait until no process is left.

        Raises:
            LostError: some are left.
        """
        began = time.monotonic()
        while left := self.processes():
            if time.monotonic() - began > LONGEST_STOP:
                names = []
                for process in left:
                    with suppress(psutil.Error):
                        names.append(" ".join(process.cmdline())[:80])
                raise LostError(f"left after {LONGEST_STOP} s: {'; '.join(names)}")
            time.sleep(0.05)

    # --------------------------------------------------------------------------------------------------------- stages

    def steps(self, stage: str) -> tuple[int, int]:
        """The last step that a stage under way has logged, and how many it has."""
        lines = [line for path in self.root.glob(f"runs/{stage}/*/metrics.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
        whole = [line for line in lines if line.endswith(b"\n")]
        last = json.loads(whole[-1]) if whole else {"step": 0, "total": 0}
        return last["step"], last["total"]

    def lines(self, stage: str) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.root.glob(f"runs/{stage}/*/metrics.jsonl"))

    def has_checkpoint(self, stage: str) -> bool:
        return any(self.root.glob(f"runs/{stage}/*/checkpoints/step-*/COMPLETE-0"))

    def has_locked(self, stage: str) -> bool:
        """Whether DVC has taken this stage's outputs."""
        path = self.root / "dvc.lock"
        # DVC writes it in place: it may be half written just now
        return path.exists() and f"\n  {stage}:\n" in path.read_text(encoding="utf-8")

    def finished(self, stage: str) -> float:
        """When the last process of a stage came to its end; infinity where none has."""
        return max((path.stat().st_mtime for path in self.root.glob(f"runs/{stage}/*/FINISHED")), default=float("inf"))

    def came_back_at(self, stage: str) -> int:
        """The step from which a stage went on last; 0 where it began anew."""
        said = "".join(path.read_text(encoding="utf-8") for path in self.root.glob(f"runs/{stage}/*/log.txt"))
        return int(([0, *re.findall(rf"^{stage}: goes on from step (\d+)", said, re.MULTILINE)])[-1])

    # ---------------------------------------------------------------------------------------------------------- state

    def give_runs(self, other: Workspace, stages: Sequence[str]) -> None:
        """Put what DVC's run cache knows of stages into another workspace: there, they need not run."""
        for path in self.root.glob(".dvc/cache/runs/*/*/*"):
            if yaml.safe_load(path.read_text(encoding="utf-8"))["cmd"].split()[-1] in stages:
                place = other.root / path.relative_to(self.root)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, place)

    def held_locks(self) -> list[str]:
        held = []
        for path in self.root.glob("runs/locks/*.lock"):
            with path.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(path.name)
        return held

    def problems(self, expected: dict[str, str], uri: str | None = None) -> list[str]:
        """What is not as a run that nothing disturbed leaves it."""
        found = [f"{name} has other bytes" for name, content in self.hashes().items() if expected[name] != content]
        found += [f"{name} is missing" for name in expected if name not in self.hashes()]
        client = MlflowClient(uri or f"sqlite:///{self.root}/mlruns/mlflow.db")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        trained: dict[str, str] = {}
        for stage in (stage for stage in DISTURBED if any(self.root.glob(f"runs/{stage}/*/metrics.jsonl"))):
            runs = client.search_runs(experiments, f"tags.stage = '{stage}' and attributes.status = 'FINISHED'")
            if len(runs) != 1 + self.repeated.count(stage):
                found.append(f"MLflow has {len(runs)} finished runs of {stage}")
                continue
            trained[f"run.{stage}"] = runs[0].info.run_id
            for run in runs:
                steps = [
                    point.step for point in client.get_metric_history(run.info.run_id, f"curves/{'loss' if stage == 'sft' else 'reward'}")
                ]
                if steps != list(range(1, self.steps(stage)[1] + 1)):
                    found.append(f"MLflow has not each step of {stage} once")
        versions = [version.version for version in client.search_model_versions("name = 'assistant'")]
        champions = [model.aliases.get("champion") for model in client.search_registered_models("name = 'assistant'")]
        if len(versions) != 1 or [str(champion) for champion in champions] != ["1"]:
            found.append(f"versions {versions}, champion {champions}")
        else:
            found += self._untold(client, trained)
        found += [f"lock {name} is held" for name in self.held_locks()]
        return found

    def _untold(self, client: MlflowClient, trained: Mapping[str, str]) -> list[str]:
        """What version 1 and its history do not say of where it comes from and that it is in service."""
        tags = client.get_model_version("assistant", "1").tags
        found = [f"version 1 has not tag {name}" for name, value in trained.items() if tags.get(name) != value]
        found += [] if "promoted" in tags else ["version 1 has not tag promoted"]
        history = client.get_registered_model("assistant").tags
        last = json.loads(history[max(name for name in history if name.startswith("history."))])
        found += [] if last["state"] == "done" else [f"the last move is {last['state']}"]
        words = ["git", "rev-parse", "--verify", "refs/tags/assistant-v1"]
        revision = subprocess.run(words, cwd=self.root, capture_output=True, text=True, check=False).stdout.strip()
        return found + ([] if revision == tags["git.revision"] else ["git has not tag assistant-v1"])


class Server:
    """Prefect's or MLflow's server, with its data in a folder of its own."""

    def __init__(self, kind: str, folder: Path, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.kind, self._folder = kind, folder
        self._environment = {name: value for name, value in environment.items() if name != MARK} | {"PREFECT_HOME": str(folder / "prefect")}
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = ("--host", "127.0.0.1", "--port", str(self._port))
        words: tuple[str, ...] = ("prefect", "server", "start", *where)
        if self.kind == "mlflow":
            stores = (
                "--backend-store-uri",
                f"sqlite:///{self._folder}/server.db",
                "--artifacts-destination",
                str(self._folder / "artifacts"),
            )
            words = ("mlflow", "server", *stores, *where, "--workers", "1")
        with (self._folder / f"{self.kind}.log").open("ab") as log:
            self._process = subprocess.Popen(
                words, cwd=self._folder, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        until(self._answers, f"{self.kind} does not answer at {self.address}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.address + ("/api/health" if self.kind == "prefect" else "/health"), timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL for all of it, as a machine that goes away."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def base_workspaces(folder: Path) -> tuple[Workspace, Workspace]:
    """A workspace in which sft, ppo and evaluate are to do, the last one's results being in the run cache; and one with all done."""
    before, done = folder / "before", folder / "done"
    if (folder / "MADE").exists():
        return Workspace(before), Workspace(done)
    for path in (before, done):
        shutil.rmtree(path, ignore_errors=True)
    first = Workspace(before)
    first.run("rlhf", "use", "sandbox", *SMALL)
    first.run("dvc", "repro", "reward")
    second = first.copy(done)
    second.run("rlhf", "run")
    files = Path(".dvc") / "cache" / "files"
    shutil.copytree(second.root / files, first.root / files, dirs_exist_ok=True, copy_function=_if_missing)
    second.give_runs(first, ["evaluate"])
    (folder / "MADE").touch()
    return first, second


def free_port() -> int:
    """Below those that the system gives to any connection: a server that was away must find it free."""
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no port between 20000 and 32767 is free")


def _if_missing(source: str, target: str) -> None:
    if not Path(target).exists():
        shutil.copy2(source, target)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition.

    Raises:
        LostError: it does not come to hold.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LostError(what)
        time.sleep(0.05)


def await_middle(place: Workspace, stage: str, ended: Callable[[], bool]) -> None:
    """Wait until this start of a stage has made a step past a third of them all, with a checkpoint to go on from.

    Raises:
        LostError: the run ended before.
    """
    before = place.lines(stage)

    def middle() -> bool:
        if ended():
            raise LostError(f"the run ended before the middle of {stage}")
        step, total = place.steps(stage)
        return place.lines(stage) > before and 3 * step > total > 0 and place.has_checkpoint(stage)

    until(middle, f"{stage} did not come to its middle")


def _after(words: Sequence[str], option: str) -> str:
    return words[words.index(option) + 1] if option in words[:-1] else ""


def _program(words: Sequence[str]) -> str:
    """The name of a console script, which Python runs by its path."""
    return next((Path(word).name for word in words[:3] if Path(word).parent == Path(sys.executable).parent and "python" not in word), "")
