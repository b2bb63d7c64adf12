"""MLflow runs of sweeps: one of the sweep, below it one of each point, below that those of the stages that were trained for it.

As with stages, nothing fails because MLflow is away: what it could not take, the next `rlhf sweep` sends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config
from rlhf.redact import redact
from rlhf.tracking.runs import NOTE
from rlhf.tracking.sending import NOT_IN_NAMES, PARAMS_PER_BATCH, open_run
from rlhf.tracking.store import client, initialise

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


class SweepRuns:
    """The runs of one sweep.

    Args:
        root: the user's workspace.
        params: what says where MLflow is.
        record: identity of the sweep.
        name: of the sweep.
        started: in ms.
    """

    def __init__(self, root: Path, params: config.Params, record: str, name: str, started: int) -> None:
        self._root, self._params, self._record = root, params, record
        self._name, self._started = name, started
        self._client: MlflowClient | None = None
        self._parent = ""
        self._warned = False

    def record(self, number: int) -> str:
        """Identity of a point's run, which its stages name as the one above them; number 0 is the sweep's own."""
        return f"{self._record}-{number}" if number else self._record

    def begin(self) -> bool:
        """Have the sweep's own run, below which the others are; False where MLflow could not be reached."""
        return self._try(lambda: self._connected) is not None

    def open(self, number: int, name: str, values: Mapping[str, Any]) -> bool:
        """Have the run of a point; False where MLflow could not be reached."""
        return self._try(lambda: self._open(number, name, values)) is not None

    def finish(self, number: int, name: str, values: Mapping[str, Any], numbers: Mapping[str, float], error: str) -> bool:
        """End the run of a point with what came of it; False where MLflow could not be reached."""
        from mlflow.entities import Metric, RunTag

        def send() -> str:
            run, now = self._open(number, name, values), int(time.time() * 1000)
            metrics = [Metric(f"final/{NOT_IN_NAMES.sub('_', key)}", float(value), now, 0) for key, value in numbers.items()]
            tags = [RunTag(NOTE, f"**Failed**: {redact(error)[:1000]}")] if error else []
            self._connected.log_batch(run, metrics=metrics, tags=tags)
            self._connected.set_terminated(run, "FAILED" if error else "FINISHED")
            return run

        return self._try(send) is not None

    def end(self, status: str, note: str, report: Path | None) -> bool:
        """End the sweep's own run, with its report; False where MLflow could not be reached."""
        from mlflow.entities import RunTag

        def send() -> str:
            connected = self._connected
            connected.log_batch(self._parent, tags=[RunTag(NOTE, note)])
            if report and report.exists():
                connected.log_artifact(self._parent, str(report))
            connected.set_terminated(self._parent, status)
            return self._parent

        return self._try(send) is not None

    def _open(self, number: int, name: str, values: Mapping[str, Any]) -> str:
        from mlflow.entities import Param, RunTag

        connected = self._connected
        run = open_run(
            {"record": self.record(number), "started": int(time.time() * 1000), "name": name}, self._root, connected, self._experiment
        )
        tags = {"sweep": self._name, "mlflow.parentRunId": self._parent, "dvc.experiment": name}
        params = [Param(key, str(value)) for key, value in values.items()]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            connected.log_batch(run, params=params[start : start + PARAMS_PER_BATCH])
        connected.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])
        return run

    @property
    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._experiment = initialise(self._root, self._params)
            found = client(self._root, self._params)
            values = {"record": self._record, "started": self._started, "name": f"sweep {self._name}"}
            self._parent = open_run(values, self._root, found, self._experiment)
            found.set_tag(self._parent, "sweep", self._name)
            found.set_tag(self._parent, "mlflow.source.name", "rlhf sweep")
            found.update_run(self._parent, status="RUNNING")
            self._client = found
        return self._client

    def _try(self, call: Any) -> str | None:
        try:
            return str(call())
        except Exception as error:  # whatever goes wrong here, the sweep goes on
            if not self._warned:
                said = " ".join(str(error).split())[:200]
                print(f"warning: MLflow: {redact(said)}; the next `rlhf sweep` sends what it lacks", file=sys.stderr, flush=True)
            self._warned = True
            return None
