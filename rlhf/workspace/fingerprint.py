"""What a stage reads and writes, as dvc.yaml says, and the fingerprint of its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import SCORING, STAGES, Params, kind, text
from rlhf.documents import YAMLError, load_yaml
from rlhf.errors import UserError
from rlhf.paths import inside

LINEAGE = "lineage.json"  # in the folder of each model: what made it, and the SHA-256 of its files


@dataclass(frozen=True)
class Node:
    """One stage of dvc.yaml."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metrics: tuple[str, ...]
    plots: Mapping[str, Mapping[str, Any]]
    description: str = ""

    @property
    def written(self) -> tuple[str, ...]:
        """Every path that the stage writes."""
        return (*self.outputs, *self.metrics, *self.plots)


def read_graph(root: Path) -> dict[str, Node]:
    """The stages of dvc.yaml.

    Raises:
        UserError: dvc.yaml is missing, holds no stages, or names a path outside its folder.
    """
    path = root / "dvc.yaml"
    return nodes(text.read(path, remedy="run in the folder of the project"), path)


def nodes(content: Any, path: Path) -> dict[str, Node]:
    """The stages of the content of a dvc.yaml; `path` names it in errors.

    Raises:
        UserError: it holds no stages, or names a path outside its folder.
    """
    stages = content.get("stages") if isinstance(content, dict) else None
    try:
        if not isinstance(stages, dict):
            raise ValueError("it has none")
        return {name: _node(name, entry) for name, entry in stages.items()}
    except ValueError as error:
        raise UserError(f"{path}: not a DVC graph with a map `stages`: {error}", remedy=f"restore it: git checkout {path.name}") from None


def check_algorithm(graph: Mapping[str, Node], params: Params) -> None:
    """Check that dvc.yaml has no stage of another algorithm than params.yaml names, has its warm start, and knows the files of its reward
    functions.

    Raises:
        UserError: it has.
    """
    others = [stage for stage in graph if kind(stage) in STAGES and stage not in params.stages]
    rounds = [stage for stage in params.stages if "-" in stage and stage not in graph and params.policy in graph]
    if others or rounds:
        said = f"has stage {' and '.join(others)}" if others else f"lacks stage {' and '.join(rounds)}"
        asked = f"algorithm: {params.algorithm}" + (f" and iterative.rounds: {params.rounds}" if params.policy == "iterative" else "")
        raise UserError(
            f"dvc.yaml {said}, but params.yaml says {asked}",
            remedy=f"`rlhf use params.yaml algorithm={params.algorithm}` sets dvc.yaml to it",
        )
    if params.warm_starts and params.policy in graph and params.start not in graph[params.policy].inputs:
        what = f"dvc.yaml has no stage awac, which awac.versions: {params.awac.versions} of params.yaml asks for"
        raise UserError(what, remedy="`rlhf use params.yaml` sets dvc.yaml to it")
    if params.policy in graph and params.tunes != ("plots/ultho.csv" in graph[params.policy].plots):
        what = f"{params.policy}.ultho of params.yaml is {'set' if params.tunes else 'null'}, but dvc.yaml says otherwise"
        raise UserError(what, remedy="`rlhf use params.yaml` sets dvc.yaml to it")
    if lacking := _inputs_of_rewards(graph, params):
        what = f"dvc.yaml lacks {', '.join(lacking)}, which section rewards of params.yaml asks for"
        raise UserError(what, remedy="`rlhf use params.yaml` sets dvc.yaml to it")


def _inputs_of_rewards(graph: Mapping[str, Node], params: Params) -> list[str]:
    """What dvc.yaml lacks of what section rewards asks for."""
    calling = [graph[stage] for stage in params.stages if kind(stage) in SCORING and stage in graph]
    files = [f"input {file} of stage {node.name}" for node in calling for file in params.reward_files if file not in node.inputs]
    # a graph that has no sft begins elsewhere: who wrote it has a reward model already
    return [*files, *(["stage reward"] if params.trains_reward and calling and "sft" in graph and "reward" not in graph else [])]


def _node(name: Any, entry: Any) -> Node:
    if not isinstance(name, str) or not isinstance(entry, dict):
        raise ValueError(f"stage {name!r} is no map of values")

    def paths(key: str) -> tuple[str, ...]:
        return tuple(_options(name, key, entry.get(key, [])))

    # numbers are metrics whether DVC lists them or not
    numbers = [path for path in paths("outs") if path.startswith("metrics/")]
    outputs = tuple(path for path in paths("outs") if path not in numbers)
    metrics = (*numbers, *paths("metrics"))
    plots = _options(name, "plots", entry.get("plots", []))
    node = Node(name, paths("deps"), outputs, metrics, plots, str(entry.get("desc", "")))
    for path in (*node.inputs, *node.written):
        if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"dvc.yaml: stage {name}: {path} leads out of the workspace", remedy="give a path below the folder of dvc.yaml")
    return node


def _options(stage: str, key: str, entries: Any) -> dict[str, dict[str, Any]]:
    # DVC writes an entry as `path`, or as `path: {options}`
    found: dict[str, dict[str, Any]] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        pairs = [(entry, None)] if isinstance(entry, str) else list(entry.items()) if isinstance(entry, dict) else []
        path, options = pairs[0] if len(pairs) == 1 else (None, None)
        if not isinstance(entries, list) or not isinstance(path, str) or not isinstance(options, dict | None):
            raise ValueError(f"{key} of stage {stage} has {entry!r}, and is to be a list of paths")
        found[path] = dict(options or {})
    return found


def check_inputs(root: Path, stage: str, graph: Mapping[str, Node]) -> None:
    """Check that every input of a stage is there.

    Raises:
        UserError: names the input that is missing, and the stage that makes it; or one that is a link out of the workspace.
    """
    for path in graph[stage].inputs:
        if not inside(root, path, f"input of stage {stage}").exists():
            makers = [node.name for node in graph.values() if any(path == out or path.startswith(f"{out}/") for out in node.written)]
            remedy = f"run `dvc repro {makers[0]}`, which makes it" if makers else "bring it back: `git checkout` or `dvc pull`"
            raise UserError(f"{path}: input of stage {stage}, no such file or folder", remedy=remedy)


def check_models(root: Path, folders: Iterable[str], hashes: Mapping[str, str]) -> None:
    """Check that the models that a stage reads are as they were written: DVC does not look at the files of its cache again.

    Args:
        root: the workspace.
        folders: the stage's inputs.
        hashes: of all their files.

    Raises:
        UserError: names the file that has changed since.
    """
    for folder in folders:
        path = root / folder / LINEAGE
        if not path.is_file():
            continue
        try:
            lineage = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            lineage = {"stage": Path(folder).name, "files": {}}
        expected = {f"{folder}/{name}": digest for name, digest in lineage.get("files", {}).items()}
        found = {name: digest for name, digest in hashes.items() if name.startswith(f"{folder}/") and name != f"{folder}/{LINEAGE}"}
        if "files" in lineage and (wrong := differences(expected, found)):
            maker = lineage["stage"]
            raise UserError(
                f"{', '.join(wrong)}: not as stage {maker} wrote it",
                remedy=f"`chmod -R u+w .dvc/cache` lets DVC find what is damaged there; then `rm -r {folder}` and run again",
            )


def locked(root: Path, stage: str) -> dict[str, str]:
    """The MD5 of each output of a stage, by path, as dvc.lock has them; none where it does not know the stage, or is being written."""
    try:
        entry = load_yaml((root / "dvc.lock").read_text(encoding="utf-8"))["stages"][stage]
        return {out["path"]: out["md5"] for out in entry["outs"]}
    except (FileNotFoundError, YAMLError, TypeError, KeyError):
        return {}


def md5(path: Path) -> str:
    """As DVC names a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def hash_inputs(root: Path, inputs: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of every file of the inputs, by path; compiled Python is left out."""
    hashes = {}
    for name in inputs:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                with file.open("rb") as content:
                    hashes[(Path(name) / file.relative_to(path)).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def fingerprint(stage: str, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """One short hash of all that a stage's result depends on."""
    content = json.dumps({"stage": stage, "params": params, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The files that were changed, added or removed."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
