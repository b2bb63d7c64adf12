"""Files that MLflow keeps in the workspace and no registered version needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType
from mlflow.utils.file_utils import local_file_uri_to_path

from rlhf import tracking
from rlhf.config import Params
from rlhf.registry.versions import connect


def is_own(root: Path, params: Params) -> bool:
    """Whether the database is the workspace's own: of a shared one, nobody here knows what others are about to register."""
    return tracking.tracking_uri(root, params) == tracking.own_uri(root)


def models(root: Path, params: Params) -> dict[str, Path]:
    """Models that were stored for a version, and no version refers to (it was deleted, or never came about): id → folder."""
    if not is_own(root, params):
        return {}
    client = connect(root, params)
    needed = {version.source.removeprefix("models:/") for version in _all(client.search_model_versions)}
    names = {params.promote.model} | {model.name for model in _all(client.search_registered_models)}
    made = [model for model in _all(client.search_logged_models, experiment_ids=_experiments(client)) if model.name in names]
    folders = {model.model_id: Path(local_file_uri_to_path(model.artifact_location)).parent for model in made}
    return {model: folder for model, folder in folders.items() if model not in needed and _is_here(root, folder)}


def runs(root: Path, params: Params) -> dict[str, Path]:
    """Runs that were deleted in MLflow, and that no version names: id → folder of artifacts."""
    if not is_own(root, params):
        return {}
    client = connect(root, params)
    tags = (version.tags.items() for version in _all(client.search_model_versions))
    needed = {value for items in tags for name, value in items if name.startswith("run.")}
    deleted = _all(client.search_runs, experiment_ids=_experiments(client), run_view_type=ViewType.DELETED_ONLY)
    folders = {run.info.run_id: Path(local_file_uri_to_path(run.info.artifact_uri)) for run in deleted}
    return {run: folder for run, folder in folders.items() if run not in needed and _is_here(root, folder)}


def forget(model: str, root: Path, params: Params) -> None:
    """Mark a model as deleted in MLflow."""
    connect(root, params).delete_logged_model(model)


def _experiments(client: Any) -> list[str]:
    return [experiment.experiment_id for experiment in _all(client.search_experiments, view_type=ViewType.ALL)]


def _is_here(root: Path, folder: Path) -> bool:
    return folder.is_dir() and folder.resolve().is_relative_to((root / "mlruns").resolve())


def _all(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """What a search finds, page by page."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
