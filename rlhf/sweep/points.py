"""The points of a sweep: values, the params.yaml and dvc.yaml that they make, and keys of stages, by which points share what is equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.config.data import FileSource
from rlhf.errors import UserError
from rlhf.sweep.space import Space, Values
from rlhf.workspace import dag, fingerprint, presets


@dataclass(frozen=True)
class Point:
    """One point. `stages` are those of its graph in their order, each with a key of all that its result depends on, code and data aside."""

    values: Values
    text: str  # of params.yaml
    graph: str  # of dvc.yaml
    params: config.Params
    stages: dict[str, str]
    after: dict[str, tuple[str, ...]]  # the stages that each one reads from

    @property
    def key(self) -> str:
        """What tells it from points that would give other results."""
        return _hash(self.stages)


class Maker:
    """Makes points from values, on the params.yaml and dvc.yaml that a sweep began with.

    Args:
        root: a checkout of what the sweep began with.
        home: the user's workspace, where the data lie.
        space: of the sweep.
        file: the sweep's own, for errors.
    """

    def __init__(self, root: Path, home: Path, space: Space, file: Path) -> None:
        self._root, self._home, self._space, self._file = root, home, space, file
        self._text = (root / "params.yaml").read_text(encoding="utf-8")
        self._graph = (root / "dvc.yaml").read_text(encoding="utf-8")
        self.params = config.load(root / "params.yaml")
        self._usual = dag.text(root, self.params)

    def make(self, values: Values) -> Point:
        """The point of some values.

        Raises:
            UserError: unknown key, or a value out of bounds.
        """
        try:
            text, params = presets.with_values(self._text, self._space.overrides(values), str(self._file))
        except UserError as error:
            said = error.what if str(self._file) in error.what else f"{self._file}: {error.what}"
            raise UserError(said, remedy=error.remedy) from None
        usual = dag.text(self._root, params)
        # a graph that somebody has changed stays as it is, unless the point needs another one
        graph = self._graph if usual == self._usual else usual
        nodes = fingerprint.nodes(config.text.parse(graph, "dvc.yaml"), self._root / "dvc.yaml")
        fingerprint.check_algorithm(nodes, params)
        self._check_data(params)
        self._check_inputs(nodes)
        after = {name: tuple(_makers(node, nodes)) for name, node in nodes.items()}
        return Point(values, text, graph, params, _keys(nodes, after, params), after)

    def _check_data(self, params: config.Params) -> None:
        for number, source in enumerate(params.data.sources):
            path = source.path if isinstance(source, FileSource) else None
            if path is not None and not (path.startswith(f"{presets.RAW}/") and (self._home / path).exists()):
                what = f"{self._file}: data.sources.{number}.path: {path} is not there, below {presets.RAW}"
                raise UserError(what, remedy=f"bring it there first: `rlhf use params.yaml data.sources.{number}.path={path}`")

    def _check_inputs(self, nodes: dict[str, fingerprint.Node]) -> None:
        """What no stage makes has to be there: earlier answers, say, which `rlhf use` brings."""
        for node in nodes.values():
            made = [out for other in nodes.values() for out in other.written]
            given = [path for path in node.inputs if not any(path == out or path.startswith(f"{out}/") for out in made)]
            if lacking := [path for path in given if not any((place / path).exists() for place in (self._root, self._home))]:
                what = f"{self._file}: {lacking[0]}: input of stage {node.name} of a point, and no such file or folder"
                raise UserError(what, remedy="bring it first: `rlhf use params.yaml KEY=VALUE` with the values that ask for it")

    def grid(self) -> tuple[list[Point], int]:
        """The points of the grid that differ in what comes out, and how many of it are the same as another.

        Raises:
            UserError: a value is wrong, or no stage depends on a key.
        """
        points = [self.make(values) for values in self._space.grid()]
        for key in self._space.values:
            self._check_matters(key, points)
        different = {point.key: point for point in reversed(points)}
        found = [point for point in points if different[point.key] is point]
        return found, len(points) - len(found)

    def corners(self) -> None:
        """Check every value and every end of a range beside the first ones of the other keys, before anything trains.

        Raises:
            UserError: a value is wrong, or no stage depends on a key.
        """
        points = [self.make(values) for values in self._space.corners()]
        for key in self._space.values:
            self._check_matters(key, points)

    def _check_matters(self, key: str, points: Sequence[Point]) -> None:
        by_others: dict[str, set[str]] = {}
        for point in points:
            others = _hash({name: value for name, value in point.values.items() if name != key})
            by_others.setdefault(others, set()).add(point.key)
        if len({json.dumps(point.values[key]) for point in points}) > 1 and all(len(keys) == 1 for keys in by_others.values()):
            what = f"{self._file}: values.{key}: no stage of these points depends on it: all would give the same"
            raise UserError(what, remedy="take it out, or set the algorithm that reads it (`rlhf use`, or under fixed)")


def _keys(nodes: dict[str, fingerprint.Node], after: dict[str, tuple[str, ...]], params: config.Params) -> dict[str, str]:
    """Key of each stage, in an order in which each one comes after those that it reads from."""
    keys: dict[str, str] = {}

    def find(name: str) -> str:
        if name not in keys:
            before = {other: find(other) for other in after[name]}
            values = params.of_stage(name) if config.kind(name) in config.STAGES else params.model_dump(mode="json")
            keys[name] = _hash([name, values, before, nodes[name].inputs, nodes[name].written])
        return keys[name]

    for name in nodes:
        find(name)
    return keys


def _makers(node: fingerprint.Node, nodes: dict[str, fingerprint.Node]) -> Iterable[str]:
    for other in nodes.values():
        if any(path == out or path.startswith(f"{out}/") for path in node.inputs for out in other.written):
            yield other.name


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
