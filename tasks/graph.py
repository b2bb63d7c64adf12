"""The DVC graph of a workspace: its stages in the order of their dependencies, and which of them are up to date."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.utils.strictyaml import YAMLSyntaxError, YAMLValidationError

from rlhf.errors import UserError

# its bars would stand between those of `rlhf run`
for _bars in ("dvc.progress", "dvc_data.callbacks"):
    logging.getLogger(_bars).setLevel(logging.CRITICAL)

SECONDS_TO_WRITE = 5  # which DVC needs for its bookkeeping at most


class BusyError(UserError):
    """DVC is at work in the workspace: what is up to date cannot be told."""


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


def read(root: Path, until: str | None = None) -> list[Stage]:
    """All stages, or one with those that it needs, each after those that it depends on.

    Raises:
        BusyError: a stage is being run.
        UserError: there is no DVC repository, or dvc.yaml or a .dvc file is wrong.
    """
    with _opened(root) as repo:
        graph = repo.index.graph
        changed = repo.status()
        nodes = list(networkx.topological_sort(graph.reverse()))
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
    wanted = {until} if until else stages.keys()
    for stage in reversed(stages.values()):
        if stage.name in wanted:
            wanted |= set(stage.after)
    return [stage for stage in stages.values() if stage.name in wanted]


def check(root: Path) -> None:
    """Check that DVC reads dvc.yaml and the .dvc files.

    Raises:
        UserError: it does not.
    """
    with _opened(root) as repo:
        _ = repo.index.graph


@contextmanager
def _opened(root: Path) -> Iterator[Repo]:
    try:
        with Repo(str(root)) as repo:
            yield repo
    except LockError:
        raise BusyError(f"{root}: a stage is being run there just now", remedy="wait until it has ended, then try again") from None
    except DvcException as error:
        # of a file that cannot be read, which key or line is wrong stands apart
        what = ": ".join(filter(None, map(str, (error, getattr(error, "exc", None) or "")))).split()
        remedy = "run `git init` and `dvc init` there once" if not (root / ".dvc").is_dir() else "correct the file that the message names"
        raise UserError(f"{root}: {' '.join(what)}", remedy=remedy) from None


def mend(root: Path) -> None:
    """Remove what a kill in the middle of DVC's own bookkeeping leaves, on which every later `dvc repro` would fail."""
    locks = root / ".dvc" / "tmp" / "rwlock"
    if not _is_whole(locks):
        time.sleep(SECONDS_TO_WRITE)  # unless somebody is writing it just now
        if not _is_whole(locks):
            locks.unlink(missing_ok=True)
    lock = root / "dvc.lock"
    with suppress(DvcException), Repo(str(root)) as repo:
        if not _is_lock(repo, lock) and "<<<<<<<" not in lock.read_text(encoding="utf-8"):  # a merge is for people to end
            (root / "runs").mkdir(exist_ok=True)
            lock.replace(root / "runs" / "dvc.lock.damaged")  # the run cache knows what it knew
        for entry in Path(repo.stage_cache.cache_dir).glob("*/*"):
            if time.time() - entry.stat().st_mtime > SECONDS_TO_WRITE:
                with suppress(OSError):
                    entry.rmdir()  # of an entry of the run cache that was never written; others are not empty


def _is_lock(repo: Repo, path: Path) -> bool:
    try:
        Lockfile(repo, str(path)).load()
    except (YAMLSyntaxError, YAMLValidationError):
        return False
    return True


def _is_whole(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True


def _name(node: Any) -> str:
    # DVC's own addressing of a node is relative to the current folder
    return str(getattr(node, "name", None) or node.path_in_repo)
