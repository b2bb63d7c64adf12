"""Answers of earlier versions, brought into the workspace as data: what stage awac learns from is then a function of the tree."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dvc.api
from dvc.exceptions import DvcException

from rlhf.config import Params
from rlhf.data import earlier
from rlhf.errors import UserError
from rlhf.job import read_lines, write_lines
from rlhf.paths import inside
from rlhf.registry.versions import Version, versions
from rlhf.workspace import presets, snapshot

ROLLOUTS, ANSWERS = "data/rollouts.jsonl", "data/answers.jsonl"
RATINGS = presets.RAW / "ratings"
ROW = ("prompt", "source", "reference", "columns")  # of a line; its gold is not for training, nor are scores of an older reward model


def bring(root: Path, params: Params) -> list[str]:
    """Write the answers of the newest versions that have some into data/raw/earlier, in the place of those before, and version it.

    With them go pairs of ratings that have become data: both sides are answers, whoever wrote them.

    Returns:
        What was done, in lines for people; none where awac.versions is 0.

    Raises:
        UserError: there is no earlier version, none has answers, or no prompt has two of them.
    """
    if not params.warm_starts:
        return []
    if any(source.name == earlier.FOLDER.name for source in params.data.sources):
        what = f"data.sources: a source is named {earlier.FOLDER.name}, whose folder is that of earlier answers"
        raise UserError(what, remedy="give it another name, or set awac.versions to 0")
    chosen = _with_answers(root, params)
    found = {f"v{version.number}": list(_of_version(root, version)) for version in chosen}
    found["ratings"] = [line for file in sorted((root / RATINGS).rglob("*.jsonl")) for row in read_lines(file) for line in _of_pair(row)]
    earlier.usable([line for lines in found.values() for line in lines])
    folder = inside(root, earlier.FOLDER, "awac.versions")
    with tempfile.TemporaryDirectory(dir=root / presets.RAW) as scratch:
        for name, lines in found.items():
            if lines:
                write_lines(Path(scratch) / "new" / f"{name}.jsonl", lines)
        # DVC may have made the old ones links into its cache, which must not be written through
        shutil.rmtree(folder, ignore_errors=True)
        (Path(scratch) / "new").rename(folder)
    counts = ", ".join(f"{name} {len(lines)}" for name, lines in found.items() if lines)
    return [f"answers of earlier versions in {earlier.FOLDER}: {counts}", presets.version(root, earlier.FOLDER)]


def _with_answers(root: Path, params: Params) -> list[Version]:
    """The newest versions that have rollouts which this repository can reach."""
    known = versions(root, params)
    if not known:
        what = f"awac.versions is {params.awac.versions}, but there is no version of {params.promote.model} yet to learn from"
        raise UserError(what, remedy="set it to 0 for the first run")
    have = [one for one in known if f"md5.{ROLLOUTS}" in one.tags and snapshot.has(root, one.tags["git.revision"])]
    if not have:
        what = f"awac.versions: none of {len(known)} versions of {params.promote.model} has rollouts in a commit of this repository"
        raise UserError(what, remedy="set it to 0; versions that ppo or an algorithm without a critic trains here will have some")
    return have[: params.awac.versions]


def _of_version(root: Path, version: Version) -> Iterator[dict[str, Any]]:
    """The answers of a version's training, and those of its evaluation: the prompts of these may not be held out any more."""
    for row in _lines(root, version, ROLLOUTS):
        yield _about(row) | {"answer": row["answer"], "ended": row.get("ended", True)}
    for row in _lines(root, version, ANSWERS) if f"md5.{ANSWERS}" in version.tags else ():
        for name, answer in row["answers"].items():
            yield _about(row) | {"answer": answer, "ended": row.get("ended", {}).get(name, True)}


def _about(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ROW if name in row}


def _of_pair(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for side in ("chosen", "rejected"):
        yield {"prompt": row["prompt"], "answer": row[side]}


def _lines(root: Path, version: Version, path: str) -> list[dict[str, Any]]:
    """The lines of a file that a version's run wrote, from DVC's cache or a remote.

    Raises:
        UserError: neither has it, or it is another one.
    """
    try:
        with dvc.api.open(path, repo=str(root), rev=version.tags["git.revision"], mode="rb") as file:
            content: bytes = file.read()
    except (DvcException, OSError) as error:
        what = f"version {version.number}: {path} cannot be had: {' '.join(str(error).split())}"
        raise UserError(what, remedy="bring it with `dvc fetch --all-tags`, or lower awac.versions") from None
    if hashlib.md5(content).hexdigest() != version.tags[f"md5.{path}"]:
        what = f"version {version.number}: {path} is not the file that its run wrote"
        raise UserError(what, remedy="lower awac.versions, or set it to 0")
    return [json.loads(line) for line in content.splitlines()]
