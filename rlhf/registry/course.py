"""When a flow run began and who or what started it, and how long each of its stages took, in this run or an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rlhf import tracking
from rlhf.config import Params


@dataclass(frozen=True)
class Stage:
    """A stage's MLflow run; `now`: this flow run trained it. Times are in ms, `ended` None where the run has no end yet."""

    name: str
    now: bool
    started: int
    ended: int | None
    page: str


@dataclass(frozen=True)
class Course:
    """A flow run; `page` is that of its own MLflow run, times are in ms."""

    by: str
    started: int
    ended: int
    page: str
    stages: list[Stage]


def of_flow(own: str, tags: Mapping[str, str], by: str, root: Path, params: Params) -> Course:
    """The course of a flow run that is about to end.

    Args:
        own: the id of its MLflow run.
        tags: of the version that it registered, which name the stages' runs.
        by: who or what started it.
        root: the workspace.
        params: of the workspace.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    client = tracking.client(root, params)
    flow = client.get_run(own)
    stages = []
    for name in params.stages:
        if made := tags.get(f"run.{name}"):
            run = client.get_run(made)
            now = run.data.tags.get("mlflow.parentRunId") == own
            stages.append(Stage(name, now, run.info.start_time, run.info.end_time, tracking.page(made, root, params)))
    return Course(by, flow.info.start_time, int(datetime.now(UTC).timestamp() * 1000), tracking.page(own, root, params), stages)


def moment(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def duration(milliseconds: int) -> str:
    """In words that a person reads: 12 s, 3 min 5 s, 2 h 7 min."""
    seconds = round(milliseconds / 1000)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
