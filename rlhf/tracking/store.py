"""Where MLflow keeps the runs: a server, or a database in the workspace that is made where it is missing."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rlhf import config
from rlhf.locks import lock
from rlhf.workspace.find import home

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
SECONDS_TO_WRITE = 60  # somebody else's transaction is waited for as long
# where `rlhf serve` and `mlflow ui` show a database, unless told otherwise
PAGES = "http://127.0.0.1:5000"
# MLflow's pages open on runs, and not on the traces of an application: the tag says so to some of its versions, the address to others
KIND = {"mlflow.experimentKind": "custom_model_development"}
AS_TRAINING = "?workflowType=machine_learning"
# where MLflow's database says, absolutely, in which folder the files of something lie
PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


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

    The workspace's own database is told where its files lie now, as the workspace may have been moved or copied.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    uri, own = tracking_uri(root, params), _database(root)
    own.parent.mkdir(exist_ok=True)
    # two stages that start side by side would both create the database
    with lock(home(root), "mlflow"):
        if uri == own_uri(root) and not own.exists():
            # beside and renamed: a launcher that ends half-way through would leave tables that MLflow cannot mend
            beside = own.with_suffix(".new")
            beside.unlink(missing_ok=True)
            _client(f"sqlite:///{beside}")
            beside.rename(own)
        if uri == own_uri(root):
            _bring_home(root)
        found = _client(uri).get_experiment_by_name(params.tracking.experiment)
        if found:
            for name, value in KIND.items() - found.tags.items():
                _client(uri).set_experiment_tag(found.experiment_id, name, value)
            return found.experiment_id
        # as an address: of a bare path, MLflow would take `%25` for an escaped `%`
        artifacts = (home(root) / "mlruns" / "artifacts").as_uri() if uri.startswith("sqlite:") else None
        return _client(uri).create_experiment(params.tracking.experiment, artifact_location=artifacts, tags=KIND)


def _bring_home(root: Path) -> None:
    """Let every place in the own database that is in some workspace's mlruns be in this one's: it was moved or copied, if they differ."""
    own = (home(root) / "mlruns").as_uri()

    def here(place: str | None) -> str | None:
        if place is None or not place.startswith(("/", "file:")):
            return place
        _, found, below = place.rpartition("/mlruns/")
        return f"{own}/{below}" if found else place

    with closing(sqlite3.connect(_database(root), timeout=SECONDS_TO_WRITE)) as database, database:
        database.create_function("here", 1, here)
        # one row for each experiment: on the way of every command
        if database.execute("SELECT 1 FROM experiments WHERE artifact_location != here(artifact_location)").fetchone():
            for table, column in PLACES.items():
                database.execute(f"UPDATE {table} SET {column} = here({column})")


def _database(root: Path) -> Path:
    return home(root) / "mlruns" / "mlflow.db"


def _client(uri: str) -> MlflowClient:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # a second and a half to load: never on the way of a stage's start
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def page(run: str | None, root: Path, params: config.Params, pages: str | None = None) -> str:
    """The address of a run's page, or of that of all runs.

    Args:
        run: its id; None: all runs.
        root: the workspace.
        params: of the workspace.
        pages: where a database is shown; None: where `rlhf serve` says (RLHF_MLFLOW_PAGES), or as `mlflow ui` does.

    Raises:
        mlflow.exceptions.MlflowException: MLflow is away.
    """
    uri = tracking_uri(root, params)
    server = urlsplit(uri if uri.startswith("http") else pages or os.environ.get("RLHF_MLFLOW_PAGES", PAGES))
    # without a password that may stand in it
    place = server._replace(netloc=server.netloc.rpartition("@")[2], path=server.path.rstrip("/") + "/")
    return f"{place.geturl()}#/experiments/{initialise(root, params)}/runs{f'/{run}' if run else ''}{AS_TRAINING}"
