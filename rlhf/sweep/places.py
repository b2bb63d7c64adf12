"""The workspaces of a sweep's points: checkouts of what it began with, below .dvc/tmp/exps, with the cache of the user's own.

There they are to everything else what DVC's temporary experiments are: MLflow runs and GPUs are the workspace's own, and nothing is
registered from them (`rlhf.workspace.find`).
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.launcher import processes
from rlhf.sweep.points import Point
from rlhf.workspace import snapshot

KEPT = ("runs", ".dvc", "mlruns")
SECONDS_TO_WRITE = 5  # an entry of DVC's run cache


@dataclass(frozen=True)
class Place:
    """Where one task of a sweep runs."""

    root: Path  # the user's workspace
    folder: Path  # of the checkout
    revision: str

    @property
    def workspace(self) -> Path:
        """The workspace in the checkout: a part of it, where the user's is a part of a repository."""
        return self.folder / snapshot.prefix(self.root)

    def prepare(self, point: Point, cache: Path) -> None:
        """Have a checkout with the values of a point; of one that was there, all but checkpoints is made anew.

        Args:
            point: whose values.
            cache: DVC's, of the user's workspace.
        """
        self.stop()
        if not self.folder.exists():
            beside = self.folder.with_suffix(".new")
            shutil.rmtree(beside, ignore_errors=True)
            beside.parent.mkdir(parents=True, exist_ok=True)
            snapshot.checkout(self.root, self.revision, beside)
            beside.rename(self.folder)
        root = self.workspace
        snapshot.restore(root, self.revision, KEPT)
        shutil.rmtree(root / ".dvc" / "tmp", ignore_errors=True)  # a kill may have left half of a lock there
        _use_cache(self.root, root, cache)
        (root / "params.yaml").write_text(point.text, encoding="utf-8")
        (root / "dvc.yaml").write_text(point.graph, encoding="utf-8")
        base = point.params.base
        if base.source == "pretrained" and not (root / base.model).exists() and (self.root / base.model).is_dir():
            (root / base.model).parent.mkdir(parents=True, exist_ok=True)
            (root / base.model).symlink_to((self.root / base.model).resolve())

    def note(self, pid: int) -> None:
        """Note the group of processes that works here."""
        self._pid.write_text(str(pid), encoding="utf-8")

    def stop(self) -> None:
        """Stop what a sweep that was killed has left at work here."""
        with suppress(FileNotFoundError, ValueError):
            group = int(self._pid.read_text(encoding="utf-8"))
            # the number may be that of others by now; and dvc may be gone, and the stage that it had started not
            if any(self._is_at_work(pid) for pid in processes.living(group)):
                processes.stop_groups([group])
        self._pid.unlink(missing_ok=True)

    def _is_at_work(self, pid: int) -> bool:
        with suppress(psutil.Error):
            return Path(psutil.Process(pid).cwd()).is_relative_to(self.folder)
        return False

    @property
    def _pid(self) -> Path:
        return self.folder.with_suffix(".pid")

    def remove(self) -> None:
        """Delete the checkout."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._pid.unlink(missing_ok=True)


def _use_cache(home: Path, root: Path, cache: Path) -> None:
    """Let DVC use the user's cache, and what the user has set for this machine alone."""
    from configobj import ConfigObj  # DVC's own form

    settings = ConfigObj(str(home / ".dvc" / "config.local"), list_values=False)
    settings.setdefault("cache", {})["dir"] = str(cache)
    settings.filename = str(root / ".dvc" / "config.local")
    settings.write()


def cache_of(root: Path) -> Path:
    """DVC's cache of a workspace, in which a kill may have left an entry of the run cache without content, on which DVC would stumble.

    Raises:
        UserError: this is no DVC repository.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from rlhf.errors import UserError

    try:
        with Repo(str(root)) as repo:
            cache = Path(repo.cache.local_cache_dir)
            runs = Path(repo.stage_cache.cache_dir)
    except DvcException as error:
        raise UserError(f"{root}: {' '.join(str(error).split())}", remedy="run `git init` and `dvc init` there once") from None
    for entry in runs.glob("*/*"):
        if time.time() - entry.stat().st_mtime > SECONDS_TO_WRITE:
            with suppress(OSError):
                entry.rmdir()  # others are not empty
    return cache
