"""What a stage's process knows of its run: the params, where to write, and where its metrics go.

The launcher (rlhf/launcher/launch.py) sets the environment; `docs/architecture.md`, "Between launcher and stage", is the contract.
"""

from __future__ import annotations

import atexit
import csv
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rlhf import config
from rlhf.errors import UserError, full_disk

SECONDS_BETWEEN_LINES = 1.0


@dataclass(frozen=True)
class Job:
    """One stage under way, seen from inside its process (one of several where it has ranks)."""

    stage: str
    params: config.Params
    root: Path
    folder: Path
    device: str
    rank: int
    world_size: int
    local_rank: int
    clock: dict[str, float] = field(default_factory=dict)  # when the last line was printed, and when the step under way began
    rollouts: Path | None = None  # stored answers to train from, instead of sampling

    @classmethod
    def from_environment(cls, stage: str) -> Job:
        try:
            root, folder, params, device = (os.environ[f"RLHF_{name}"] for name in ("ROOT", "JOB_DIR", "PARAMS", "DEVICE"))
        except KeyError as missing:
            raise UserError(f"{missing} is not set", remedy=f"start the stage with `rlhf launch {stage}`") from None
        ranks = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))}
        return cls(
            os.environ.get("RLHF_STAGE", stage),  # of a round it has the number
            config.load(Path(params)),
            Path(root),
            Path(folder),
            device,
            ranks["RANK"],
            ranks["WORLD_SIZE"],
            ranks["LOCAL_RANK"],
            rollouts=Path(os.environ["RLHF_ROLLOUTS"]) if "RLHF_ROLLOUTS" in os.environ else None,
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0

    @property
    def number(self) -> int:
        """Which round the stage belongs to: 2 for answers-2; 1 where there are none."""
        return int(self.stage.partition("-")[2] or 1)

    def input(self, path: str) -> Path:
        """An input, by its path in dvc.yaml."""
        return self.root / path

    @property
    def functions(self) -> Path:
        """Where the launcher has put copies of the reward functions' files, as they are when it looks at the inputs."""
        return self.folder / "functions"

    def output(self, path: str) -> Path:
        """Where to write an output, by its path in dvc.yaml. The launcher moves it there once the stage has succeeded."""
        place = self.folder / "out" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def random(self, *purpose: object) -> random.Random:
        """A generator of its own for each purpose, all from the one seed."""
        return random.Random("/".join(map(str, (self.params.seed, self.stage, *purpose))))

    def seed(self, *purpose: object) -> int:
        """A seed for torch, numpy and the like, for each purpose its own."""
        return self.random(*purpose).getrandbits(63)

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step (rank 0): a JSON line for MLflow and, once a second at most, a plain line for people."""
        if not self.is_main:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            line = {"step": step, "total": total, "at": int(time.time() * 1000), "metrics": dict(metrics)}
            if "step" in self.clock:
                line["seconds"] = time.monotonic() - self.clock["step"]
            file.write(json.dumps(line) + "\n")
        # a quick stage would spend its processor time on its own log
        if step in (1, total) or time.monotonic() - self.clock.get("line", 0.0) >= SECONDS_BETWEEN_LINES:
            self.clock["line"] = time.monotonic()
            print(f"{self.stage} {step}/{total} " + " ".join(f"{name}={value:.4g}" for name, value in metrics.items()), flush=True)

    def say(self, text: str) -> None:
        if self.is_main:
            print(f"{self.stage}: {text}", flush=True)

    def write_metrics(self, metrics: Mapping[str, Any], name: str | None = None) -> None:
        """Write metrics/STAGE.json, or one of another name. Nothing in it may differ between two runs of the same inputs."""
        self.output(f"metrics/{name or self.stage}.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    def write_plot(self, path: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a table that DVC and MLflow draw."""
        rows = list(rows)
        columns = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
        with self.output(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def run(stage: str, main: Callable[[Job], None]) -> None:
    """Run a stage's main function; a UserError becomes one line on standard error and exit code 1, and so does a full disk."""
    gc.freeze()  # what is loaded by now stays: nothing to look through again and again
    gc.set_threshold(700, 10, 10)  # Python's own, which the launcher raised while libraries are loaded
    try:
        job = Job.from_environment(stage)
        try:
            main(job)
            if job.is_main:
                (job.folder / "FINISHED").touch()
        except Exception as error:
            if full := full_disk(error, job.folder):
                raise full from error
            raise
    except UserError as error:
        print(f"error: {error.what}\n  remedy: {error.remedy}", file=sys.stderr, flush=True)
        sys.exit(1)
    atexit.register(_leave)


def _leave() -> NoReturn:
    """End the process of a stage that has succeeded before the interpreter takes itself apart.

    Python's threads have ended by now; those of gloo and NCCL have not, and may abort it: a rank would have failed with its work done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        UserError: a line is not JSON.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error.msg})", remedy="run `dvc repro prepare`, which writes it"
                ) from None
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
