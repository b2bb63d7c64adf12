"""Sending to MLflow what a record holds and MLflow lacks.

What is sent twice, because a kill came before it was noted, is there once: a run is found again by its tag `record`, and to MLflow a
metric of the same step, time and value is the same metric.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.locks import lock
from rlhf.tracking import pictures, samples
from rlhf.tracking.record import FLOWS, Record, read

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

METRICS_PER_BATCH = 1000
# MLflow's pages group charts by what stands before the slash, in the order of the alphabet: the curves that decide, details, final numbers
CURVES = ("reward", "kl", "score", "accuracy", "heldout_accuracy", "loss", "eos_rate", "answer_tokens")
COST = ("seconds", "share", "per_second", "utilisation", "memory_gib", "tokens_seen", "learning_rate")
PARAMS_PER_BATCH = 100
NOT_IN_NAMES = re.compile(r"[^\w .:/-]")  # MLflow's, which kinds of tasks may hold


class Sender:
    """Sends what a record's folder holds and MLflow lacks."""

    def __init__(self, root: Path, client: MlflowClient, experiment: str, record: Record) -> None:
        self._client, self._record = client, record
        values = record.values
        parent = run_of_flow(values["parent"], root, client, experiment) if values["parent"] else None
        self._above = {"mlflow.parentRunId": parent} if parent else {}
        if values["run"] is None or not self._exists(values["run"]):
            record.update(run=open_run(values, root, client, experiment), steps={})
        elif values["status"] == "RUNNING":
            self._client.update_run(values["run"], status="RUNNING")
        self._describe()

    def _exists(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _describe(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        values = self._record.values
        params = [Param(name, value) for name, value in values["params"].items()]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            self._client.log_batch(values["run"], params=params[start : start + PARAMS_PER_BATCH])
        self._send_tags()
        inputs = []
        for data in values["datasets"]:
            use = InputTag("mlflow.data.context", "evaluation" if "heldout" in data["name"] else "training")
            source = json.dumps({"uri": data["name"]})
            inputs.append(DatasetInput(Dataset(data["name"], data["digest"], "local", source, profile=json.dumps(data["profile"])), [use]))
        if inputs:
            self._client.log_inputs(values["run"], inputs)

    def _send_tags(self) -> None:
        from mlflow.entities import RunTag

        tags = self._record.values["tags"] | self._above
        self._client.log_batch(self._record.values["run"], tags=[RunTag(name, value) for name, value in tags.items()])

    def send(self) -> None:
        """Send the new steps, and at the end the results."""
        from mlflow.entities import Metric

        values, folder = self._record.values, self._record.folder
        ended = values["ended"]
        steps = dict(values["steps"])
        new = []
        # a stage that goes on from a checkpoint logs some steps a second time
        for step, at, name, value in _logged(folder):
            if step > steps.get(name, -1):
                steps[name] = step
                new.append(Metric(name, value, at, step))
        for start in range(0, len(new), METRICS_PER_BATCH):
            self._client.log_batch(values["run"], metrics=new[start : start + METRICS_PER_BATCH])
        if new:
            self._record.update(steps=steps)
        if ended:
            self._finish(max((step for name, step in steps.items() if not name.startswith("system/")), default=0), ended)

    def _finish(self, step: int, ended: int) -> None:
        from mlflow.entities import Metric, RunTag

        values, results = self._record.values, self._record.folder / "results"
        self._send_tags()
        for path in sorted(results.glob("metrics/*.json")):
            at = int(path.stat().st_mtime * 1000)
            found = leaves(json.loads(path.read_text(encoding="utf-8")), ".")
            numbers = [
                Metric(f"final/{NOT_IN_NAMES.sub('_', name)}", float(value), at, step)
                for name, value in found
                if isinstance(value, int | float)
            ]
            self._client.log_batch(values["run"], metrics=numbers)
        for path, axes in values["plots"].items():
            pictures.draw(results / path, axes)
        if samples.write(self._record.folder / "rollouts.jsonl", results / samples.ARTIFACT):
            self._client.log_batch(values["run"], tags=[RunTag(name, value) for name, value in samples.TAG.items()])
        if results.exists():
            self._client.log_artifacts(values["run"], str(results))
        self._client.set_terminated(values["run"], values["status"], ended)
        self._record.update(sent=True)


def run_of_flow(flow_run_id: str, root: Path, client: MlflowClient, experiment: str) -> str | None:
    """The id of a flow run's own run; None where there is none."""
    # a stage may be the first to reach MLflow: it opens the flow's run, which the flow finds then
    values = read(root / FLOWS / flow_run_id)
    return open_run(values, root, client, experiment) if values else _find(flow_run_id, client, experiment)


def open_run(values: Mapping[str, Any], root: Path, client: MlflowClient, experiment: str) -> str:
    """The run of a record: one that was made for it already, or a new one."""
    with lock(root, "mlflow"):
        found = _find(values["record"], client, experiment)
        if found is None:
            tags = {"record": values["record"]}
            found = client.create_run(experiment, start_time=values["started"], tags=tags, run_name=values["name"]).info.run_id
        return found


def _find(record: str, client: MlflowClient, experiment: str) -> str | None:
    runs = client.search_runs([experiment], f"tags.record = '{record}'", max_results=1)
    return runs[0].info.run_id if runs else None


def _logged(folder: Path) -> Iterator[tuple[int, int, str, float]]:
    for path in (folder / "metrics.jsonl", folder / "system.jsonl"):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines(keepends=True):
            # the last line may be under way, and one may have been cut off by a full disk
            with suppress(json.JSONDecodeError):
                if line.endswith("\n"):
                    entry = json.loads(line)
                    yield from ((entry["step"], entry["at"], charted(name), float(value)) for name, value in entry["metrics"].items())


def charted(name: str) -> str:
    """A step's metric as it is called in MLflow: with the section of charts that it belongs to."""
    if "/" in name:
        return name
    return f"{'curves' if name in CURVES else 'speed' if name.endswith(COST) else 'details'}/{name}"


def leaves(value: Any, separator: str, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, separator, f"{name}{separator}{key}" if name else str(key))
    else:
        yield name, value
