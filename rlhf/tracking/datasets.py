"""The data that a stage reads, each file by its name, its hash as DVC has it, and its size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.documents import load_yaml

FOLDER = "data/"
BLOCK_BYTES = 1 << 20


def read(root: Path, inputs: Iterable[str]) -> list[dict[str, Any]]:
    """The data among a stage's inputs.

    Args:
        root: the workspace.
        inputs: paths in dvc.yaml.

    Returns:
        For each file below data/, and each raw part that DVC has under version control: `name` (its path in the workspace), `digest`
        (MD5, of a folder as DVC counts it), `profile` (lines, bytes).
    """
    found: list[dict[str, Any]] = []
    for name in inputs:
        path = root / name
        if not name.startswith(FOLDER):
            continue
        if path.is_file():
            found.append(_file(path, name))
        else:
            for pointer in sorted(path.rglob("*.dvc")):
                for part in load_yaml(pointer.read_text(encoding="utf-8"))["outs"]:
                    place = (pointer.parent / part["path"]).relative_to(root).as_posix()
                    found.append({"name": place, "digest": part["md5"], "profile": {"bytes": part.get("size")}})
    return found


def _file(path: Path, name: str) -> dict[str, Any]:
    digest, size, lines = hashlib.md5(usedforsecurity=False), 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size, lines = size + len(block), lines + block.count(b"\n")
    return {"name": name, "digest": digest.hexdigest(), "profile": {"lines": lines, "bytes": size}}
