"""Paths that come from params, dvc.yaml or data: they stay in the workspace."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.errors import UserError


def inside(root: Path, path: str | Path, what: str) -> Path:
    """`root / path`, with links followed.

    Args:
        what: names where the path comes from, for messages.

    Raises:
        UserError: it leads out of `root`: it is absolute, goes up, or a link on the way does.
    """
    place = (root / path).resolve()
    if not place.is_relative_to(root.resolve()):
        raise UserError(f"{what}: {path} leads out of {root}, to {place}", remedy="give a path below that folder, without links out of it")
    return place


def check_links(folder: Path, what: str) -> None:
    """Check that no link in a folder leads out of it.

    Raises:
        UserError: names the link.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_symlink():
                inside(folder, path.relative_to(folder), what)
