"""Versions as they stand in the registry, and the files of one, checked against what was registered."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from rlhf import tracking
from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.registry import serving


class DamagedError(UserError):
    """A version's files are not those that were registered."""

    folder = Path()  # where they lie


ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>.+)|/(?P<number>\d+))")


# many facts of a kind are kept as one tag of JSON: MLflow's page shows all tags of a version side by side
FOLDED = ("data", "evaluate", "fingerprint", "gate", "md5")


@dataclass(frozen=True)
class Version:
    """One version of the registered model; its tags with those of FOLDED taken apart, as `evaluate.kl`."""

    model: str
    number: int
    created: datetime
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.number}"


def connect(root: Path, params: Params) -> MlflowClient:
    """MLflow's client.

    Raises:
        UserError: MLflow is away.
    """
    uri = tracking.tracking_uri(root, params)
    try:
        tracking.initialise(root, params)
    except MlflowException as error:
        reason = error.message.splitlines()[0]
        raise UserError(f"MLflow at {uri}: {reason}", remedy="start it and run again: what is trained is not trained again") from None
    # mlflow looks models:/ addresses up through the process-wide address only
    mlflow.set_tracking_uri(uri)
    return MlflowClient()


def versions(root: Path, params: Params) -> list[Version]:
    """All versions, newest first; none where nothing was registered yet."""
    found = connect(root, params).search_model_versions(f"name = '{params.promote.model}'", order_by=["version_number DESC"])
    by_number: dict[int, list[str]] = {}
    for alias, number in aliases(root, params).items():
        by_number.setdefault(number, []).append(alias)
    return [_version(entry, tuple(by_number.get(int(entry.version), ()))) for entry in found]


def of_all_models(root: Path, params: Params) -> list[Version]:
    """The versions of every registered model that the pipeline has made, whatever its name; without their aliases."""
    return [_version(entry, ()) for entry in connect(root, params).search_model_versions() if "git.revision" in entry.tags]


def find(root: Path, params: Params, number: int) -> Version:
    """One version by its number.

    Raises:
        UserError: there is none.
    """
    try:
        entry = connect(root, params).get_model_version(params.promote.model, str(number))
    except MlflowException as error:
        raise _unknown(f"version {number} of {params.promote.model}", error) from None
    return _version(entry, tuple(entry.aliases))


def resolve(root: Path, params: Params, name: str) -> Version:
    """One version by its number or an alias, as people write it.

    Raises:
        UserError: there is none.
    """
    if name.isdecimal():
        return find(root, params, int(name))
    known = aliases(root, params)
    if name not in known:
        what = f"'{name}' is neither the number of a version of {params.promote.model} nor an alias"
        raise UserError(what, remedy=f"give a number, or one of {', '.join(sorted(known)) or 'the aliases, once there are some'}")
    return find(root, params, known[name])


def tag(version: Version, root: Path, params: Params, name: str, value: str) -> None:
    """Set a tag of a version."""
    connect(root, params).set_model_version_tag(version.model, str(version.number), name, value)


def aliases(root: Path, params: Params) -> dict[str, int]:
    """Which version each alias points at; empty where nothing was registered yet."""
    found = connect(root, params).search_registered_models(f"name = '{params.promote.model}'")
    return {alias: int(number) for model in found for alias, number in model.aliases.items()}


def model_folder(uri: str, root: Path, params: Params) -> Path:
    """The Hugging Face folder of a registered model, for example of `models:/assistant@champion`.

    Raises:
        UserError: there is no such model, version or alias, or a file of it is not what was registered.
    """
    client = connect(root, params)
    match = ADDRESS.fullmatch(uri)
    if match is None:
        raise UserError(f"{uri}: no address of a registered model", remedy="write models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        # by number from here on: an alias may move meanwhile
        if match["alias"]:
            entry = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            entry = client.get_model_version(match["name"], match["number"])
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{entry.name}/{entry.version}"))
    except MlflowException as error:
        raise _unknown(uri, error) from None
    if wrong := serving.differences(folder, entry.tags.get("sha256.files")):
        damaged = DamagedError(
            f"{uri} (version {entry.version}) is refused: {'; '.join(wrong)}",
            remedy=f"`rlhf rollback`, or bring back the file: `rlhf verify {entry.version}` tells whether the DVC cache still has it",
        )
        damaged.folder = folder
        raise damaged
    return folder / "artifacts"


def _unknown(what: str, error: MlflowException) -> UserError:
    return UserError(f"{what}: {error.message}", remedy="`rlhf models` lists the versions and aliases")


def _version(entry: ModelVersion, aliased: tuple[str, ...]) -> Version:
    created = datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC)
    return Version(entry.name, int(entry.version), created, tuple(sorted(aliased)), unfold(entry.tags))


def fold(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as the registry keeps them."""
    plain = {name: value for name, value in tags.items() if name.partition(".")[0] not in FOLDED}
    groups: dict[str, dict[str, str]] = {}
    for name in tags.keys() - plain.keys():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tags[name]
    return plain | {group: json.dumps(facts, sort_keys=True, ensure_ascii=False) for group, facts in groups.items()}


def unfold(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as the rest of the code reads them."""
    found = {name: value for name, value in tags.items() if name not in FOLDED}
    for group in tags.keys() & {*FOLDED}:
        found |= {f"{group}.{name}": value for name, value in json.loads(tags[group]).items()}
    return found
