"""Values for one run: params.yaml holds them while it lasts, so that DVC, the stages and the run's commit see the same.

It is put back afterwards. What DVC has by then stays: the next run finds the outputs of its own values in DVC's cache, where they were
made before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf.workspace import presets

FILES = ("params.yaml", "dvc.yaml")  # the second is of another algorithm's graph, where the values choose one


@contextmanager
def values(root: Path, changes: Sequence[str]) -> Iterator[None]:
    """Have `key=value` changes in params.yaml for as long as the context lasts. Files that somebody edits meanwhile stay as they are then.

    What a run that was killed has left is put back first. Call it where no other run can be under way.

    Raises:
        UserError: unknown key, or a value out of bounds; nothing is changed then.
    """
    _put_back(root)
    if not changes:
        yield
        return
    try:
        _folder(root).mkdir(parents=True)
        _copy(root, "before")
        presets.use(root, str(root / "params.yaml"), list(changes))
        _copy(root, "during")
        yield
    finally:
        _put_back(root)


def _put_back(root: Path) -> None:
    for name in FILES:
        place, during = root / name, _kept(root, name, "during")
        if during.exists() and place.exists() and place.read_bytes() == during.read_bytes():
            _kept(root, name, "before").replace(place)
    shutil.rmtree(_folder(root), ignore_errors=True)


def _copy(root: Path, when: str) -> None:
    for name in FILES:
        shutil.copyfile(root / name, _kept(root, name, when))


def _kept(root: Path, name: str, when: str) -> Path:
    return _folder(root) / f"{name}.{when}"  # DVC takes whatever is called dvc.yaml for a graph


def _folder(root: Path) -> Path:
    return root / "runs" / "values"
