"""MLflow runs of the stages: sent from a thread of the launcher, which never waits for MLflow and never fails because of it.

What is to be sent stands in files: metrics.jsonl and results/ beside tracking.json, which says how far MLflow has them. So what could
not be sent now is sent later, by `send_waiting`. What a kill leaves sent but not noted is sent twice: MLflow keeps one of equals.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rlhf import config
from rlhf.errors import UserError
from rlhf.fingerprint import Node
from rlhf.locks import lock
from rlhf.processes import Stopped
from rlhf.redact import redact

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SECONDS_BETWEEN_BATCHES = 2
SECONDS_AT_THE_END = 10
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PANELS_PER_ROW = 4
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def tracking_uri(root: Path, params: config.Params) -> str:
    """Where the runs go: MLFLOW_TRACKING_URI, else tracking.uri, else the workspace's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri or own_uri(root)


def own_uri(root: Path) -> str:
    """The workspace's own database."""
    return f"sqlite:///{_database(root)}"


def client(root: Path, params: config.Params) -> MlflowClient:
    """MLflow's client; a server that is away is given up within seconds."""
    return _client(tracking_uri(root, params))


def initialise(root: Path, params: config.Params) -> str:
    """Create the database and the experiment where they are missing; the experiment's id.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    uri, own = tracking_uri(root, params), _database(root)
    own.parent.mkdir(exist_ok=True)
    # two stages that start side by side would both create the database
    with lock(root, "mlflow"):
        if uri == f"sqlite:///{own}" and not own.exists():
            # beside and renamed: a launcher that ends half-way through would leave tables that MLflow cannot mend
            beside = own.with_suffix(".new")
            beside.unlink(missing_ok=True)
            _client(f"sqlite:///{beside}")
            beside.rename(own)
        found = _client(uri).get_experiment_by_name(params.tracking.experiment)
        if found:
            return found.experiment_id
        artifacts = str(root / "mlruns" / "artifacts") if uri.startswith("sqlite:") else None
        return _client(uri).create_experiment(params.tracking.experiment, artifact_location=artifacts)


def _database(root: Path) -> Path:
    return root / "mlruns" / "mlflow.db"


def _client(uri: str) -> MlflowClient:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # a second and a half to load: never on the way of a stage's start
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def run_of(fingerprint: str, root: Path, params: config.Params) -> str | None:
    """The id of the latest finished run with this fingerprint.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    experiment = initialise(root, params)
    which = f"tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
    runs = client(root, params).search_runs([experiment], which, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


class Record:
    """tracking.json: what the run is, and how far MLflow has it. One process at a time holds it."""

    def __init__(self, root: Path, folder: Path, *, wait: bool) -> None:
        """Read it, waiting for another process that holds it or not.

        Raises:
            UserError: another process holds it, and `wait` is off.
        """
        self.folder = folder
        self._path = folder / "tracking.json"
        self._saving = threading.Lock()
        self._held = ExitStack()
        # beside tracking.json, and deleted with it
        name = f"../{folder.parent.name}/{folder.name}/tracking"
        self._held.enter_context(lock(root, name, refuse=None if wait else f"{self._path} is in use"))
        self.values: dict[str, Any] = _read(self._path) if self._path.exists() else {}

    def update(self, **values: Any) -> None:
        with self._saving:
            self.values |= values
            beside = self._path.with_suffix(".new")
            beside.write_text(json.dumps(self.values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            beside.replace(self._path)

    def release(self) -> None:
        self._held.close()


class Tracker:
    """Follows one stage, as a context: the run is finished, failed or killed as the context ends."""

    def __init__(self, root: Path, params: config.Params, node: Node, fingerprint: str, folder: Path) -> None:
        self._root, self._params = root, params
        self._record = Record(root, folder, wait=True)
        start = {
            "tags": _tags(root, node.name, fingerprint) | {"record": uuid4().hex},
            "params": {name: str(value) for name, value in _leaves(params.of_stage(node.name), ".")},
            "plots": dict(node.plots),
            "started": _now(),
            "run": None,
            "steps": {},
        }
        self._record.update(**(start | self._record.values | {"status": "RUNNING", "ended": None, "sent": False}))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Tracker:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, Stopped) else "FAILED"
        try:
            self._record.update(status=status, ended=_now())
        except OSError as problem:
            # a full disk, most likely, of which the stage has told; what is not recorded counts as killed, and is sent later
            _warn(self._record.folder, str(problem))
        self._ending.set()
        self._thread.join(SECONDS_AT_THE_END)
        if self._thread.is_alive():
            _warn(self._record.folder, "no answer yet")
        self._record.release()

    def _follow(self) -> None:
        sender: Sender | None = None
        warned = False
        while True:
            # read first, so that the last round sees all that was written
            ending = self._ending.is_set()
            try:
                if sender is None:
                    sender = Sender(self._root, self._params, self._record)
                    sender.send()
                    send_waiting(self._root)
                sender.send()
            # whatever goes wrong here, training goes on
            except Exception as error:
                if not warned:
                    _warn(self._record.folder, " ".join(str(error).split())[:200])
                warned = True
            if ending:
                return
            self._ending.wait(SECONDS_BETWEEN_BATCHES)


class Sender:
    """Sends what a record's folder holds and MLflow lacks."""

    def __init__(self, root: Path, params: config.Params, record: Record) -> None:
        from mlflow.entities import Param

        # first: a client makes a database that is missing, in place and without a lock
        experiment = initialise(root, params)
        self._client, self._record = client(root, params), record
        values = record.values
        if values["run"] is None or not self._exists(values["run"]):
            record.update(run=self._create(experiment), steps={})
        elif values["status"] == "RUNNING":
            self._client.update_run(values["run"], status="RUNNING")
        params_left = [Param(name, value) for name, value in values["params"].items()]
        for start in range(0, len(params_left), PARAMS_PER_BATCH):
            self._client.log_batch(values["run"], params=params_left[start : start + PARAMS_PER_BATCH])

    def _create(self, experiment: str) -> str:
        values = self._record.values
        made = self._client.search_runs([experiment], f"tags.record = '{values['tags']['record']}'", max_results=1)
        if made:
            return made[0].info.run_id
        run = self._client.create_run(experiment, start_time=values["started"], tags=values["tags"], run_name=values["tags"]["stage"])
        return run.info.run_id

    def _exists(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def send(self) -> None:
        """Send the new steps, and at the end the results."""
        from mlflow.entities import Metric

        values, folder = self._record.values, self._record.folder
        ended = values["ended"]
        steps = dict(values["steps"])
        new = []
        # a stage that goes on from a checkpoint logs some steps a second time
        for step, at, name, value in _logged(folder / "metrics.jsonl"):
            if step > steps.get(name, -1):
                steps[name] = step
                new.append(Metric(name, value, at, step))
        for start in range(0, len(new), METRICS_PER_BATCH):
            self._client.log_batch(values["run"], metrics=new[start : start + METRICS_PER_BATCH])
        if new:
            self._record.update(steps=steps)
        if ended:
            self._finish(max(steps.values(), default=0), ended)

    def _finish(self, step: int, ended: int) -> None:
        from mlflow.entities import Metric

        values, results = self._record.values, self._record.folder / "results"
        for path in sorted(results.glob("metrics/*.json")):
            leaves = _leaves(_read(path), "/")
            at = int(path.stat().st_mtime * 1000)
            numbers = [Metric(f"final/{name}", float(value), at, step) for name, value in leaves if isinstance(value, int | float)]
            self._client.log_batch(values["run"], metrics=numbers)
        for path, axes in values["plots"].items():
            draw(results / path, axes)
        if results.exists():
            self._client.log_artifacts(values["run"], str(results))
        self._client.set_terminated(values["run"], values["status"], ended)
        self._record.update(sent=True)


def send_waiting(root: Path) -> None:
    """Send what earlier launches could not send; MLflow being away is no error.

    Raises:
        UserError: params.yaml is missing or wrong.
    """
    params = config.load(root / "params.yaml")
    for folder in waiting(root):
        try:
            record = Record(root, folder, wait=False)
        except UserError:
            continue  # a launch is at it
        try:
            if not record.values["ended"]:
                record.update(status="KILLED", ended=_now())
            Sender(root, params, record).send()
        except Exception as error:
            _warn(folder, " ".join(str(error).split())[:200])
            return
        finally:
            record.release()


def waiting(root: Path, stage: str = "*") -> list[Path]:
    """The folders of stages (or of one) that hold something to send."""
    return [path.parent for path in sorted(root.glob(f"runs/{stage}/*/tracking.json")) if not _read(path)["sent"]]


def draw(table: Path, axes: Mapping[str, Any]) -> None:
    """Draw a CSV file as a PNG beside it: every column against dvc.yaml's x, or its one pair of axes where the template is scatter."""
    if not table.exists():
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, scatter = axes["x"], axes.get("template") == "scatter"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [axes["y"]] if scatter else [name for name in (rows[0] if rows else ()) if name != x]
    columns = min(PANELS_PER_ROW, len(names)) or 1
    figure = Figure(figsize=(4 * columns, 2.6 * -(-len(names) // columns) or 1), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, start=1):
        points = [(float(row[x]), float(row[name])) for row in rows if row[x] and row[name]]
        panel = figure.add_subplot(-(-len(names) // columns), columns, number, xlabel=x, title=name)
        panel.plot(*zip(*points, strict=True), "o" if scatter else "-") if points else None
        panel.grid(alpha=0.3)
    figure.savefig(table.with_suffix(".png"), dpi=100)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _logged(path: Path) -> Iterator[tuple[int, int, str, float]]:
    """Step, time, name and value of each metric of each step."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        # the last line may be under way
        if line.endswith("\n"):
            entry = json.loads(line)
            yield from ((entry["step"], entry["time"], name, float(value)) for name, value in entry["metrics"].items())


def _leaves(value: Any, separator: str, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, separator, f"{name}{separator}{key}" if name else str(key))
    else:
        yield name, value


def _tags(root: Path, stage: str, fingerprint: str) -> dict[str, str]:
    tags = {"stage": stage, "fingerprint": fingerprint}
    for tag, variable in (("flow_run_id", "RLHF_FLOW_RUN_ID"), ("mlflow.parentRunId", "RLHF_PARENT_RUN")):
        if os.environ.get(variable):
            tags[tag] = os.environ[variable]
    revision = _git(root, "rev-parse", "HEAD")
    if revision:
        # what a run itself writes (dvc.lock, metrics) does not count
        tags["git_revision"] = revision + ("+dirty" if _git(root, "status", "--porcelain", "--", "rlhf", "params.yaml", "dvc.yaml") else "")
    return tags


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def _now() -> int:
    return int(time.time() * 1000)


def _warn(folder: Path, reason: str) -> None:
    text = f"warning: MLflow: {redact(reason)}; the metrics wait in {folder} and are sent by the next launch or flow"
    print(text, file=sys.stderr, flush=True)
