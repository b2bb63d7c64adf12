"""Registration: the trained policy, its evaluation and what it was made of become a version of the registered model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.models import Model
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.llm import CHAT_MODEL_OUTPUT_SCHEMA
from mlflow.types.schema import Array, Object, Property
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from rlhf import tracking
from rlhf.config import STAGES, Params, kind
from rlhf.documents import load_yaml
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.registry import card, gates, serving
from rlhf.registry.versions import Version, connect, find, fold
from rlhf.tracking.sending import NOT_IN_NAMES
from rlhf.workspace import fingerprint, snapshot
from rlhf.workspace.find import refuse_experiment

ANSWERS = Path("data/answers.jsonl")
# Parts of metrics/evaluate.json that become tags of the version.
EVALUATED = (
    *("gold", "win_rate", "accuracy", "reward_model", "kl", "perplexity", "eos_rate", "answer_tokens"),
    *("refusals", "repetitions", "heldout", "judge"),
)
MESSAGE = Object([Property("role", DataType.string), Property("content", DataType.string)])
OPTIONS = {"max_tokens": DataType.long, "temperature": DataType.double, "top_p": DataType.double}
ASKED = Schema([ColSpec(Array(MESSAGE), "messages"), *(ColSpec(kind, name, required=False) for name, kind in OPTIONS.items())])
EXAMPLE = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}


def register(root: Path, params: Params, flow_run_id: str | None = None) -> Version:
    """Register the trained policy with its evaluation. The same model with the same evaluation keeps its version.

    Raises:
        UserError: the model, its metrics or dvc.lock is missing, MLflow is away, or the workspace is a temporary one of DVC's.
    """
    refuse_experiment(root)
    metrics = gates.read_metrics(root)
    weights = weights_hash(root / _model(params))
    evaluation = hashlib.sha256((root / gates.METRICS).read_bytes()).hexdigest()
    if not (root / ANSWERS).is_file():
        raise UserError(f"{ANSWERS}: no such file", remedy="run `dvc repro evaluate`, or `dvc pull`")
    name = params.promote.model
    with lock(root, "registry"):
        client = connect(root, params)
        same = client.search_model_versions(f"name = '{name}' and tags.sha256 = '{weights}' and tags.evaluation = '{evaluation}'")
        if same:
            version = find(root, params, int(same[0].version))
            _tag(root, version)  # a kill may have come between the two
            return version
        tags = {"sha256": weights, "evaluation": evaluation, "flow_run": flow_run_id or "none"}
        tags |= {"algorithm": params.policy, "algorithm.name": params.algorithm}  # the stage, and what its values are called
        tags |= _lineage(root, params) | _evaluated(metrics)
        tags["git.revision"] = snapshot.commit(root, f"Run of {name}: params, dvc.lock and metrics") or "none"
        version = find(root, params, _store(client, root, params, tags))
        _tag(root, version)
        return version


def _tag(root: Path, version: Version) -> None:
    # the same model may have been registered from another repository
    if snapshot.has(root, revision := version.tags["git.revision"]):
        snapshot.tag(root, f"{version.model}-v{version.number}", revision)


# ------------------------------------------------------------------------------------------------------- what a version is made of


def _store(client: MlflowClient, root: Path, params: Params, tags: dict[str, str]) -> int:
    run_id = tags.get(f"run.{params.policy}")
    logged = client.create_logged_model(tracking.initialise(root, params), name=params.promote.model, source_run_id=run_id)
    made = root, root / _model(params), card.card(params, tags)
    if urlparse(logged.artifact_location).scheme in ("", "file"):
        listed = _write_folder(Path(local_file_uri_to_path(logged.artifact_location)), *made, logged.model_id)
    else:
        with tempfile.TemporaryDirectory(dir=root / "runs", prefix="register-") as temporary:
            listed = _write_folder(Path(temporary) / "model", *made, logged.model_id)
            client.log_model_artifacts(logged.model_id, str(Path(temporary) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    _log_scores(client, tags, logged.model_id)
    if not client.search_registered_models(f"name = '{params.promote.model}'"):
        client.create_registered_model(params.promote.model)
    # the tags go in with the version: nobody sees one without its lineage
    source = f"models:/{logged.model_id}"
    told = card.described("Gates not checked yet", card.page(params, tags))
    version = client.create_model_version(
        params.promote.model, source, run_id=run_id, tags=fold(tags | {"sha256.files": listed}), model_id=logged.model_id, description=told
    )
    # as mlflow.register_model does, for the page of models
    named = json.dumps([{"name": version.name, "version": int(version.version)}])
    client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: named})
    return int(version.version)


def _log_scores(client: MlflowClient, tags: Mapping[str, str], model_id: str) -> None:
    """The numbers that decide as metrics of the model, so that MLflow's page of models sorts by them."""
    run_id = tags.get("run.evaluate")
    if run_id is None:  # metrics belong to a run, and MLflow has none where the evaluation was made elsewhere
        return
    at = int(time.time() * 1000)
    metrics = [
        Metric(name.format(policy="policy"), value, at, 0, model_id=model_id, run_id=run_id) for name, value in card.scores(tags).items()
    ]
    client.log_batch(run_id, metrics=metrics)


def _write_folder(place: Path, root: Path, model: Path, told: str, model_id: str) -> str:
    """Write a version's files (model with its card, answers in its evaluation, what serves it), list their hashes, make all read-only.

    Returns:
        The list's own SHA-256.
    """
    packages = ("torch", "transformers", "jinja2")
    with warnings.catch_warnings(record=True):  # that requests are not held against the type hint, which is meant
        mlflow.pyfunc.save_model(
            place,
            python_model=serving.__file__,
            artifacts={"config": (model / "config.json").as_uri()},
            pip_requirements=[f"mlflow=={mlflow.__version__}"] + [f"{name}=={installed(name).split('+')[0]}" for name in packages],
            mlflow_model=Model(model_id=model_id, metadata={"task": "llm/v1/chat"}),
        )
    _describe(place)
    shutil.copyfile(root / ANSWERS, place / "evaluation.jsonl")
    for name in ("params.yaml", "dvc.lock"):
        shutil.copyfile(root / name, place / name)
    shutil.copytree(model, place / "artifacts", copy_function=_link_weights, dirs_exist_ok=True)
    (place / "artifacts" / "README.md").write_text(told, encoding="utf-8")
    content = json.dumps(serving.hashes(place), indent=2).encode()
    (place / serving.LIST).write_bytes(content)
    for path in place.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    return hashlib.sha256(content).hexdigest()


def _describe(place: Path) -> None:
    """Say in MLmodel what the model is asked and what it gives, with an example: MLflow itself would load the model and ask it for that.

    It is marked as from type hints, so MLflow does not hold requests against it: texts and dialogues are taken as well.
    """
    # not by its `load`, to which a folder's name with % is an address
    described = Model.from_dict(load_yaml((place / "MLmodel").read_text(encoding="utf-8")))
    described.signature.inputs, described.signature.outputs = ASKED, CHAT_MODEL_OUTPUT_SCHEMA
    for name in ("input_example.json", "serving_input_example.json"):
        (place / name).write_text(json.dumps(EXAMPLE, indent=2) + "\n", encoding="utf-8")
    described.saved_input_example_info = {
        "artifact_path": "input_example.json",
        "serving_input_path": "serving_input_example.json",
        "type": "json_object",
    }
    described.save(place / "MLmodel")


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
    return Path("models") / params.policy


def weights_hash(model: Path) -> str:
    """SHA-256 of a model's weights.

    Raises:
        UserError: there are none.
    """
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{model.parent.name}/{model.name}: no model.safetensors there", remedy="run `rlhf run`, or `dvc pull` for one made elsewhere"
        )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _lineage(root: Path, params: Params) -> dict[str, str]:
    """What was checked out, hashes of data and outputs, params, and the fingerprint and MLflow run of each stage."""
    training = params.model_dump(mode="json", exclude={"launch", "tracking", "operations"})
    tags = {"params": hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()}
    tags["git.head"] = snapshot.head(root) or "none"
    try:
        locked = load_yaml((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        raise UserError("dvc.lock: no such file", remedy="run `rlhf run` or `dvc repro`, which write it") from None
    graph = fingerprint.read_graph(root)
    # dvc.lock also remembers stages that dvc.yaml no longer has
    for place in sorted((root / "data" / "raw").rglob("*.dvc")):
        for part in load_yaml(place.read_text(encoding="utf-8"))["outs"]:
            tags[f"data.{(place.parent / part['path']).relative_to(root).as_posix()}"] = part["md5"]
    tags |= {f"md5.{output['path']}": output["md5"] for name in graph if name in locked for output in locked[name].get("outs", [])}
    for stage in graph:
        if kind(stage) in STAGES:
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
                add(f"{path}.{NOT_IN_NAMES.sub('_', key)}", inner)
        elif value is not None:
            tags[path] = json.dumps(value) if isinstance(value, list) else str(value)

    for key in EVALUATED:
        add(f"evaluate.{key}", metrics.get(key))
    return tags
