"""MLflow runs: one of each flow run, and below it one of each stage that it trained, sent from a thread that trains nothing.

Nobody waits for MLflow or fails because of it. What is to be sent stands in files: metrics.jsonl, system.jsonl and results/ beside
tracking.json, which says how far MLflow has them. So what could not be sent now is sent later, by `send_waiting`. What a kill leaves sent
but not noted is sent twice: MLflow keeps one of equals.
"""

from __future__ import annotations

import getpass
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
from typing import Any

from rlhf import config
from rlhf.errors import UserError
from rlhf.redact import redact
from rlhf.tracking import datasets, pictures, sending
from rlhf.tracking.machine import Sampler
from rlhf.tracking.record import FLOWS, NAME, Record, read
from rlhf.tracking.sending import Sender, leaves
from rlhf.tracking.store import client, initialise
from rlhf.workspace import snapshot
from rlhf.workspace.find import home
from rlhf.workspace.fingerprint import Node

SECONDS_BETWEEN_BATCHES = 2
SECONDS_AT_THE_END = 10
NOTE = "mlflow.note.content"  # what MLflow's pages show as the description of a run
LONGEST_REASON = 1000  # characters


def run_of(fingerprint: str, root: Path, params: config.Params) -> str | None:
    """The id of the latest finished run with this fingerprint.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    experiment = initialise(root, params)
    which = f"tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
    runs = client(root, params).search_runs([experiment], which, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


def of_stage(root: Path, params: config.Params, node: Node, fingerprint: str, folder: Path) -> Tracker:
    """Follows a stage under way, with the load of the machine. Where a flow runs it (RLHF_FLOW_RUN_ID), its run is below the flow's."""
    flow = os.environ.get("RLHF_FLOW_RUN_ID")
    below = f"of flow run {flow}" if flow else "by itself, without a flow"
    what = f"Stage **{node.name}**, {below}: {node.description or 'see dvc.yaml'}."
    tags = {"stage": node.name, "fingerprint": fingerprint} | ({"flow_run_id": flow} if flow else {})
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    tags |= _origin(root, f"rlhf launch {node.name}", what)
    start = {
        "name": node.name,
        "tags": tags,
        "params": {name: str(value) for name, value in leaves(params.of_stage(node.name), ".")},
        "plots": dict(node.plots),
        "datasets": datasets.read(root, node.inputs),
        "parent": flow,
    }
    return Tracker(root, params, folder, start, sampled=True)


def of_flow(root: Path, params: config.Params, flow_run_id: str, name: str, by: str) -> Tracker:
    """Follows a flow run, which `by` started. What earlier ones left in runs/flow is deleted, once MLflow has it."""
    for folder in sorted((root / FLOWS).glob("*")):
        if folder.name != flow_run_id and folder not in waiting(root, FLOWS.name):
            shutil.rmtree(folder)
    shown = params.model_dump(mode="json", exclude={"tracking"})
    start: dict[str, Any] = {
        "record": flow_run_id,
        "name": name,
        "tags": {"flow": "retrain", "flow_run_id": flow_run_id} | _origin(root, by, f"Retraining, started by {by}."),
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
        place = home(root)
        # where what MLflow lacks at the end waits for it: not in a folder that DVC is about to delete
        self._waiting = folder if place == root else place / "runs" / folder.parent.name / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        first = {"record": uuid.uuid4().hex, "started": _now(), "run": None, "steps": {}}
        self._record.update(**(first | self._record.values | start | {"status": "RUNNING", "ended": None, "sent": False}))
        self._sampler: AbstractContextManager[Any] = Sampler(folder / "system.jsonl") if sampled else nullcontext()
        self._ending = threading.Event()
        self._deleted = False  # that its folder was, is said once
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
        tags = dict(self._record.values["tags"])
        if error is not None:
            tags[NOTE] = f"**{status.capitalize()}**: {redact(' '.join(str(error).split()))[:LONGEST_REASON]}\n\n{tags.get(NOTE, '')}"
        try:
            self._record.update(status=status, ended=_now(), tags=tags)
        except OSError as problem:
            # a full disk, most likely, of which the stage has told; what is not recorded counts as killed, and is sent later
            self._warn(str(problem))
        self._ending.set()
        self._thread.join(SECONDS_AT_THE_END)
        if self._thread.is_alive():
            self._warn("no answer yet")
        if not self._record.values["sent"] and self._waiting != self._record.folder and self._record.folder.exists():
            besides = ("out", "checkpoints", "hidden", "tracking.lock", "PUBLISHED")
            shutil.copytree(self._record.folder, self._waiting, ignore=shutil.ignore_patterns(*besides))
        self._record.release()

    def _warn(self, reason: str) -> None:
        if self._record.folder.exists():
            _warn(self._waiting, reason)
        elif not self._deleted:  # `dvc queue kill --force` does that under a stage that is being stopped
            print(f"warning: MLflow: {self._record.folder} was deleted: what was logged last is lost", file=sys.stderr, flush=True)
            self._deleted = True

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
                    pictures.load()  # now, and not when the stage has ended and others wait for it
                sender.send()
            # whatever goes wrong here, training goes on
            except Exception as error:
                if not warned:
                    self._warn(" ".join(str(error).split())[:200])
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
    return [path.parent for path in sorted(root.glob(f"runs/{stage}/*/{NAME}")) if not read(path.parent)["sent"]]


def _sender(root: Path, params: config.Params, record: Record) -> Sender:
    # first: a client makes a database that is missing, in place and without a lock
    experiment = initialise(root, params)
    return Sender(root, client(root, params), experiment, record)


def _origin(root: Path, source: str, what: str) -> dict[str, str]:
    """Whose run it is, what started it and from which commit, in the fields that MLflow's pages have for these, and what it is in words."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # one of a container's, without a name
        user = str(os.getuid())
    tags = {"mlflow.user": user, "mlflow.source.name": source, "mlflow.source.type": "LOCAL", NOTE: what}
    if revision := snapshot.head(root):
        tags["mlflow.source.git.commit"] = revision
        # what a run itself writes (dvc.lock, metrics) does not count
        if snapshot.changed(root, "rlhf", "params.yaml", "dvc.yaml"):
            tags[NOTE] += f"\n\nCode or params differ from commit {revision[:8]}."
    return tags


def _now() -> int:
    return int(time.time() * 1000)


def _warn(folder: Path, reason: str) -> None:
    text = f"warning: MLflow: {redact(reason)}; the metrics wait in {folder} and are sent by the next launch or flow"
    print(text, file=sys.stderr, flush=True)
