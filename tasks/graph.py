"""The DVC graph of a workspace: its stages in the order of their dependencies, and which of them are up to date."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
from dvc.exceptions import DvcException
from dvc.repo import Repo

from rlhf.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One node of the graph.

    `name` is what dvc.yaml calls the stage, or the path of a .dvc file (raw data under version control: `is_data`). `current` says that
    neither the stage nor any stage before it has anything to do.
    """

    name: str
    description: str
    after: tuple[str, ...]
    gpus: int
    retries: int
    is_data: bool
    current: bool


def read(root: Path) -> list[Stage]:
    """All stages, each after those that it depends on.

    Raises:
        UserError: there is no DVC repository, or dvc.yaml or a .dvc file is wrong.
    """
    try:
        with Repo(str(root)) as repo:
            graph = repo.index.graph
            changed = repo.status()
            nodes = list(networkx.topological_sort(graph.reverse()))
    except DvcException as error:
        remedy = "run `git init` and `dvc init` there once" if not (root / ".dvc").is_dir() else "correct the file that the message names"
        raise UserError(f"{root}: {' '.join(str(error).split())}", remedy=remedy) from None
    stages: dict[str, Stage] = {}
    for node in nodes:
        after = tuple(sorted(map(_name, graph.successors(node))))
        meta = node.meta or {}
        stages[_name(node)] = Stage(
            name=_name(node),
            description=node.desc or "",
            after=after,
            gpus=meta.get("gpus", 0),
            retries=meta.get("retries", 0),
            is_data=node.cmd is None,
            current=node.addressing not in changed and all(stages[name].current for name in after),
        )
    return list(stages.values())


def _name(node: Any) -> str:
    # DVC's own addressing of a node is relative to the current folder
    return str(getattr(node, "name", None) or node.path_in_repo)
