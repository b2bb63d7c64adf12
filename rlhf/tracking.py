"""MLflow runs: one of each flow run, and below it one of each stage that it trained, sent from a thread that trains nothing.

Nobody waits for MLflow or fails because of it. What is to be sent stands in files: metrics.jsonl, system.jsonl and results/ beside
tracking.json, which says how far MLflow has them. So what could not be sent now is sent later, by `send_waiting`. What a kill leaves sent
but not noted is sent twice: MLflow keeps one of equals.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf import config, datasets, sending, snapshot
from rlhf.errors import UserError
from rlhf.fingerprint import Node
from rlhf.locks import lock
from rlhf.machine import Sampler
from rlhf.redact import redact
from rlhf.sending import FLOWS, Sender, leaves

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SECONDS_BETWEEN_BATCHES = 2
SECONDS_AT_THE_END = 10
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# where `rlhf serve` and `mlflow ui` show a database, unless told otherwise
PAGES = "http://127.0.0.1:5000"


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


def page(run: str, root: Path, params: config.Params) -> str:
    """The address of a run's page: on the server, or where `rlhf serve` (RLHF_MLFLOW_PAGES) or `mlflow ui` shows the database.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    uri = tracking_uri(root, params)
    server = urlsplit(uri if uri.startswith("http") else os.environ.get("RLHF_MLFLOW_PAGES", PAGES))
    # without a password that may stand in it
    place = server._replace(netloc=server.netloc.rpartition("@")[2], path=server.path.rstrip("/") + "/")
    return f"{place.geturl()}#/experiments/{initialise(root, params)}/runs/{run}"


def of_stage(root: Path, params: config.Params, node: Node, fingerprint: str, folder: Path) -> Tracker:
    """Follows a stage under way, with the load of the machine. Where a flow runs it (RLHF_FLOW_RUN_ID), its run is below the flow's."""
    flow = os.environ.get("RLHF_FLOW_RUN_ID")
    tags = {"stage": node.name, "fingerprint": fingerprint} | ({"flow_run_id": flow} if flow else {}) | _revision(root)
    start = {
        "name": node.name,
        "tags": tags,
        "params": {name: str(value) for name, value in leaves(params.of_stage(node.name), ".")},
        "plots": dict(node.plots),
        "datasets": datasets.read(root, node.inputs),
        "parent": flow,
    }
    return Tracker(root, params, folder, start, sampled=True)


def of_flow(root: Path, params: config.Params, flow_run_id: str, name: str) -> Tracker:
    """Follows a flow run. What earlier ones left in runs/flow is deleted, once MLflow has it."""
    for folder in sorted((root / FLOWS).glob("*")):
        if folder.name != flow_run_id and folder not in waiting(root, FLOWS.name):
            shutil.rmtree(folder)
    shown = params.model_dump(mode="json", exclude={"tracking"})
    start: dict[str, Any] = {
        "record": flow_run_id,
        "name": name,
        "tags": {"flow": "retrain", "flow_run_id": flow_run_id} | _revision(root),
        "params": {name: str(value) for name, value in leaves(shown, ".")},
        "plots": {},
        "datasets": [],
        "parent": None,
    }
    folder = root / FLOWS / flow_run_id
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(root, params, folder, start, sampled=False)


def run_of_flow(flow_run_id: str, root: Path, params: config.Params) -> str | None:
    """The id of a flow run's own run; None where there is none.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    experiment = initialise(root, params)
    return sending.run_of_flow(flow_run_id, root, client(root, params), experiment)


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
    """Follows one run, as a context: it is finished, failed or killed as the context ends."""

    def __init__(self, root: Path, params: config.Params, folder: Path, start: dict[str, Any], *, sampled: bool) -> None:
        """Note what the run is.

        Args:
            root: the workspace.
            params: what says where MLflow is.
            folder: of the run, with what it logs.
            start: what tracking.json is to say; of a run that goes on, the rest stays as it was.
            sampled: whether the load of the machine is logged, too.
        """
        self._root, self._params = root, params
        self._record = Record(root, folder, wait=True)
        first = {"record": uuid.uuid4().hex, "started": _now(), "run": None, "steps": {}}
        self._record.update(**(first | self._record.values | start | {"status": "RUNNING", "ended": None, "sent": False}))
        self._sampler: AbstractContextManager[Any] = Sampler(folder / "system.jsonl") if sampled else nullcontext()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    @property
    def results(self) -> Path:
        """What lies there as the context ends becomes the run's artifacts, and the numbers of its metrics/*.json its final metrics."""
        return self._record.folder / "results"

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run."""
        self._record.update(tags=self._record.values["tags"] | tags)

    def __enter__(self) -> Tracker:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
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
        sampling = ExitStack()
        sampling.enter_context(self._sampler)
        while True:
            # read first, so that the last round sees all that was written
            ending = self._ending.is_set()
            if ending:
                sampling.close()
            try:
                if sender is None:
                    sender = _sender(self._root, self._params, self._record)
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


def send_waiting(root: Path) -> None:
    """Send what earlier launches and flows could not send; MLflow being away is no error.

    Raises:
        UserError: params.yaml is missing or wrong.
    """
    params = config.load(root / "params.yaml")
    for folder in waiting(root):
        try:
            record = Record(root, folder, wait=False)
        except UserError:
            continue  # somebody is at it
        try:
            if not record.values["ended"]:
                record.update(status="KILLED", ended=_now())
            _sender(root, params, record).send()
        except Exception as error:
            _warn(folder, " ".join(str(error).split())[:200])
            return
        finally:
            record.release()


def waiting(root: Path, stage: str = "*") -> list[Path]:
    """The folders of stages and flow runs (or of one stage) that hold something to send."""
    return [path.parent for path in sorted(root.glob(f"runs/{stage}/*/tracking.json")) if not _read(path)["sent"]]


def _sender(root: Path, params: config.Params, record: Record) -> Sender:
    # first: a client makes a database that is missing, in place and without a lock
    experiment = initialise(root, params)
    return Sender(root, client(root, params), experiment, record)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _revision(root: Path) -> dict[str, str]:
    revision = snapshot.head(root)
    # what a run itself writes (dvc.lock, metrics) does not count
    dirty = revision and snapshot.changed(root, "rlhf", "params.yaml", "dvc.yaml")
    return {"git_revision": revision + ("+dirty" if dirty else "")} if revision else {}


def _now() -> int:
    return int(time.time() * 1000)


def _warn(folder: Path, reason: str) -> None:
    text = f"warning: MLflow: {redact(reason)}; the metrics wait in {folder} and are sent by the next launch or flow"
    print(text, file=sys.stderr, flush=True)
