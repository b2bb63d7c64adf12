"""What a version was made of that another was not: params, data and code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from rlhf.config import text
from rlhf.errors import UserError
from rlhf.registry.versions import Version
from rlhf.tracking.sending import leaves
from rlhf.workspace import snapshot

DATA = "data."
CODE = ("rlhf", "dvc.yaml", "constraints.txt")
ABSENT = "—"


@dataclass(frozen=True)
class Changes:
    """What differs, each as lines to show; `params` as key, value before and value now."""

    params: list[tuple[str, str, str]]
    data: list[str]
    code: list[str]


def between(before: Version, now: Version, root: Path) -> Changes:
    """What changed from one version to another; what cannot be had is said in its place."""
    return Changes(_params(before, now), _data(before, now), _code(before, now, root))


def _params(before: Version, now: Version) -> list[tuple[str, str, str]]:
    try:
        old, new = (dict(leaves(_params_of(version), ".")) for version in (before, now))
    except (MlflowException, OSError, UserError) as error:
        return [("not to be had", " ".join(str(error).split())[:200], "")]
    names = dict.fromkeys([*old, *new])
    return [(name, str(old.get(name, ABSENT)), str(new.get(name, ABSENT))) for name in names if old.get(name) != new.get(name)]


def _params_of(version: Version) -> Any:
    place = f"{version.uri}/params.yaml"
    return text.parse(mlflow.artifacts.load_text(place), place)


def _data(before: Version, now: Version) -> list[str]:
    old, new = ({key.removeprefix(DATA): md5 for key, md5 in version.tags.items() if key.startswith(DATA)} for version in (before, now))
    lines = [f"{path}: new" for path in sorted(new.keys() - old.keys())]
    lines += [f"{path}: gone" for path in sorted(old.keys() - new.keys())]
    lines += [f"{path}: changed" for path in sorted(old.keys() & new.keys()) if old[path] != new[path]]
    prepared = "md5.data/prepared"
    if not lines and before.tags.get(prepared) != now.tags.get(prepared):
        lines.append("data/prepared: made anew from the same raw data, by other params or code")
    return lines


def _code(before: Version, now: Version, root: Path) -> list[str]:
    revisions = [version.tags.get("git.revision", "none") for version in (before, now)]
    missing = [version.number for version, revision in zip((before, now), revisions, strict=True) if not snapshot.has(root, revision)]
    if missing:
        return [f"the revision of version {missing[0]} is not in this repository; `git fetch --tags` brings one that was pushed"]
    files = snapshot.differing(root, *revisions, *CODE)
    heads = [version.tags["git.head"] for version in (before, now)]
    return files and [*files, *(f"commit {title}" for title in snapshot.titles(root, *heads))]
