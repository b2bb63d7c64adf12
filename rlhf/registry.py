"""Versions of the assistant in MLflow's model registry: what each was made of, which one is in service.

A version is immutable and carries its lineage in tags. Three aliases point at versions: `champion` is in service, `previous` was before it,
`candidate` is the newest one that did not pass the gates.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.file_utils import local_file_uri_to_path

from rlhf import fingerprint, gates, tracking
from rlhf.config import STAGES, Params
from rlhf.errors import UserError
from rlhf.locks import lock

# Parts of metrics/evaluate.json that become tags of the version.
EVALUATED = ("gold", "win_rate", "reward_model", "kl", "perplexity", "eos_rate", "answer_tokens", "heldout")


@dataclass(frozen=True)
class Version:
    """One version of the registered model."""

    model: str
    number: int
    created: datetime
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.number}"


@dataclass(frozen=True)
class Decision:
    """What promotion did with a version, and why."""

    version: Version
    gates: list[gates.Gate]
    champion: int | None
    lines: list[str]

    @property
    def is_champion(self) -> bool:
        return self.champion == self.version.number


def register(root: Path, params: Params, flow_run_id: str | None = None) -> Version:
    """Register the trained policy with its evaluation. The same model with the same evaluation keeps its version.

    Raises:
        UserError: the model, its metrics or dvc.lock is missing, or MLflow is away.
    """
    metrics = gates.read_metrics(root)
    weights = _weights_hash(root / _model(params), _model(params))
    evaluation = hashlib.sha256((root / gates.METRICS).read_bytes()).hexdigest()
    name = params.promote.model
    with lock(root, "registry"):
        client = _client(root, params)
        same = client.search_model_versions(f"name = '{name}' and tags.sha256 = '{weights}' and tags.evaluation = '{evaluation}'")
        if same:
            return find(root, params, int(same[0].version))
        tags = {"sha256": weights, "evaluation": evaluation, "flow_run": flow_run_id or "none", "algorithm": params.algorithm}
        tags |= _lineage(root, params) | _evaluated(metrics)
        number = _store(client, root, params, tags)
        return find(root, params, number)


def promote(version: Version, root: Path, params: Params) -> Decision:
    """Check the gates and move the aliases. Done again with nothing new, it leaves everything as it is.

    A version is promoted by this once: a champion that somebody replaced by hand does not come back by itself.

    Raises:
        UserError: a number is missing in metrics/evaluate.json.
    """
    number = str(version.number)
    with lock(root, "registry"):
        client = _client(root, params)
        champion = aliases(root, params).get("champion")
        other = find(root, params, champion).tags if champion not in (None, version.number) else None
        checked = gates.check(gates.read_metrics(root), params.algorithm, params.promote, other)
        failed = ", ".join(gate.name for gate in checked if not gate.passed)
        for gate in checked:
            client.set_model_version_tag(version.model, number, f"gate.{gate.name}", gate.line)
        client.set_model_version_tag(version.model, number, "gates", f"failed: {failed}" if failed else "passed")
        before = f"version {champion}" if champion else "none"
        if champion == version.number:
            outcome = f"version {number} is champion already"
        elif "promoted" in find(root, params, version.number).tags:
            outcome = f"version {number} was champion before: alias champion stays with version {champion}"
        elif failed:
            client.set_registered_model_alias(version.model, "candidate", number)
            outcome = f"version {number} is candidate, champion is {f'version {champion}' if champion else 'none'}; failed: {failed}"
        else:
            _put_in_service(client, version, champion)
            outcome = f"version {number} is champion, the one before is {before}"
        after = aliases(root, params).get("champion")
        return Decision(find(root, params, version.number), checked, after, [*(gate.line for gate in checked), outcome])


def _put_in_service(client: MlflowClient, version: Version, champion: int | None) -> None:
    number = str(version.number)
    # champion is moved, never deleted first: whoever loads it finds the old one or the new one
    if champion:
        client.set_registered_model_alias(version.model, "previous", str(champion))
    client.set_registered_model_alias(version.model, "champion", number)
    client.set_model_version_tag(version.model, number, "promoted", datetime.now(UTC).isoformat(timespec="seconds"))
    if int(client.get_registered_model(version.model).aliases.get("candidate", 0)) == version.number:
        client.delete_registered_model_alias(version.model, "candidate")


def versions(root: Path, params: Params) -> list[Version]:
    """All versions, newest first; none where nothing was registered yet."""
    found = _client(root, params).search_model_versions(f"name = '{params.promote.model}'", order_by=["version_number DESC"])
    by_number: dict[int, list[str]] = {}
    for alias, number in aliases(root, params).items():
        by_number.setdefault(number, []).append(alias)
    return [_version(entry, tuple(by_number.get(int(entry.version), ()))) for entry in found]


def find(root: Path, params: Params, number: int) -> Version:
    """One version by its number."""
    entry = _client(root, params).get_model_version(params.promote.model, str(number))
    return _version(entry, tuple(entry.aliases))


def aliases(root: Path, params: Params) -> dict[str, int]:
    """Which version each alias points at; empty where nothing was registered yet."""
    found = _client(root, params).search_registered_models(f"name = '{params.promote.model}'")
    return {alias: int(number) for model in found for alias, number in model.aliases.items()}


def model_folder(uri: str, root: Path, params: Params) -> Path:
    """The Hugging Face folder of a registered model, for example of `models:/assistant@champion`.

    Raises:
        UserError: there is no such model, version or alias.
    """
    _client(root, params)
    try:
        return Path(mlflow.artifacts.download_artifacts(uri)) / "artifacts"
    except MlflowException as error:
        raise UserError(f"{uri}: {error.message}", remedy="`rlhf models` lists the versions and aliases") from None


def _client(root: Path, params: Params) -> MlflowClient:
    uri = tracking.tracking_uri(root, params)
    try:
        tracking.initialise(root, params)
    except MlflowException as error:
        reason = error.message.splitlines()[0]
        raise UserError(f"MLflow at {uri}: {reason}", remedy="start it and run again: what is trained is not trained again") from None
    # mlflow looks models:/ addresses up through the process-wide address only
    mlflow.set_tracking_uri(uri)
    # what the served model takes is a union on purpose
    logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)
    return MlflowClient()


def _version(entry: ModelVersion, aliased: tuple[str, ...]) -> Version:
    created = datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC)
    return Version(entry.name, int(entry.version), created, tuple(sorted(aliased)), dict(entry.tags))


# ------------------------------------------------------------------------------------------------------- what a version is made of


def _store(client: MlflowClient, root: Path, params: Params, tags: dict[str, str]) -> int:
    run_id = tags.get(f"run.{params.algorithm}")
    logged = client.create_logged_model(tracking.initialise(root, params), name=params.promote.model, source_run_id=run_id)
    if urlparse(logged.artifact_location).scheme in ("", "file"):
        _write_folder(Path(local_file_uri_to_path(logged.artifact_location)), root / _model(params), logged.model_id)
    else:
        with tempfile.TemporaryDirectory(dir=root / "runs") as temporary:
            _write_folder(Path(temporary) / "model", root / _model(params), logged.model_id)
            client.log_model_artifacts(logged.model_id, str(Path(temporary) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    if not client.search_registered_models(f"name = '{params.promote.model}'"):
        client.create_registered_model(params.promote.model)
    # the tags go in with the version: nobody sees one without its lineage
    source = f"models:/{logged.model_id}"
    return int(client.create_model_version(params.promote.model, source, run_id=run_id, tags=tags, model_id=logged.model_id).version)


def _write_folder(place: Path, model: Path, model_id: str) -> None:
    packages = ("torch", "transformers", "jinja2")
    mlflow.pyfunc.save_model(
        place,
        python_model=str(Path(__file__).with_name("serving.py")),
        code_paths=[str(Path(__file__).parent)],
        artifacts={"config": str(model / "config.json")},
        pip_requirements=[f"mlflow=={mlflow.__version__}"] + [f"{name}=={installed(name).split('+')[0]}" for name in packages],
        mlflow_model=Model(model_id=model_id),
    )
    shutil.copytree(model, place / "artifacts", copy_function=_link_weights, dirs_exist_ok=True)


def _link_weights(source: str, target: str) -> None:
    # outputs are replaced by rename, never written in place, so a link keeps what it points at and spares a copy of gigabytes
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copyfile(source, target)


def _model(params: Params) -> Path:
    return Path("models") / params.algorithm


def _weights_hash(model: Path, name: Path) -> str:
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name}: no model.safetensors there", remedy="run `rlhf run`, or `dvc pull` for one made elsewhere")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _lineage(root: Path, params: Params) -> dict[str, str]:
    """Git revision, DVC hashes, params, and the fingerprint and MLflow run of each stage."""
    training = params.model_dump(mode="json", exclude={"launch", "tracking"})
    tags = {"params": hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()}
    tags["git.revision"] = _git(root, "rev-parse", "HEAD") or "none"
    # what a run itself writes does not make the code another one
    outputs = [f":(exclude){path}" for path in ("dvc.lock", "metrics", "plots")]
    tags["git.dirty"] = str(bool(_git(root, "status", "--porcelain", "--", ".", *outputs))).lower()
    try:
        locked = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        raise UserError("dvc.lock: no such file", remedy="run `rlhf run` or `dvc repro`, which write it") from None
    graph = fingerprint.read_graph(root)
    # dvc.lock also remembers stages that dvc.yaml no longer has
    tags |= {f"md5.{output['path']}": output["md5"] for name in graph if name in locked for output in locked[name].get("outs", [])}
    for stage in STAGES:
        if stage in graph:
            tags[f"fingerprint.{stage}"] = made = _fingerprint(root, params, graph[stage])
            if run_id := tracking.run_of(made, root, params):
                tags[f"run.{stage}"] = run_id
    return tags


def _fingerprint(root: Path, params: Params, node: fingerprint.Node) -> str:
    lineage = root / "models" / node.name / "lineage.json"
    if lineage.exists():
        return str(json.loads(lineage.read_text(encoding="utf-8"))["fingerprint"])
    return fingerprint.fingerprint(node.name, params.of_stage(node.name), fingerprint.hash_inputs(root, node.inputs))


def _evaluated(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The numbers that the gates read, each under its path in the file."""
    tags: dict[str, str] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{path}.{key}", inner)
        elif value is not None:
            tags[path] = json.dumps(value) if isinstance(value, list) else str(value)

    for key in EVALUATED:
        add(f"evaluate.{key}", metrics.get(key))
    return tags


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
