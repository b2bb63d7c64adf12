"""Prefect of a workspace: its home, the name that its pool and deployments go by, and the servers of an `rlhf serve` in it.

Prefect's own defaults are one home, one database and one port for all workspaces of a user.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.errors import UserError
from rlhf.locks import held

LOCK = "serve"
SECONDS_TO_START = 600
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Served:
    """What `rlhf serve` has started; `root` is where: a copy of a workspace must not take the servers of the first one for its own."""

    root: str
    api: str
    mlflow: str


def name(root: Path) -> str:
    """What tells a workspace from others on a server that several use: RLHF_WORKSPACE, else its folder's name with a hash of its path.

    Raises:
        UserError: RLHF_WORKSPACE holds other characters than Prefect takes.
    """
    given = os.environ.get("RLHF_WORKSPACE")
    if given and not re.fullmatch(r"[a-z0-9][a-z0-9-]*", given):
        raise UserError(f"RLHF_WORKSPACE is '{given}'", remedy="give it lowercase letters, digits and hyphens alone")
    return given or _derived(root)


def _derived(root: Path) -> str:
    place = str(root.resolve())
    readable = re.sub(r"[^a-z0-9]+", "-", root.resolve().name.lower()).strip("-")[:40]
    return f"{readable or 'workspace'}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"


def deployment(root: Path) -> str:
    """The deployment that prefect.yaml describes."""
    return f"nightly-{name(root)}"


def home(root: Path) -> str:
    """Where Prefect keeps what it keeps, unless PREFECT_HOME says otherwise."""
    return os.environ.get("PREFECT_HOME") or str(root / "runs" / "prefect")


def enter(root: Path) -> None:
    """Set the environment of this process for the workspace, before Prefect is imported: its home, and its servers where it is served.

    A server that the user names (PREFECT_API_URL) goes first.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    os.environ["PREFECT_HOME"] = home(root)
    with suppress(OSError):  # Prefect warns of a home that it cannot make, and does not make runs/
        Path(home(root)).mkdir(parents=True, exist_ok=True)
    if servers := find(root):
        os.environ["PREFECT_API_URL"] = servers.api
        os.environ.setdefault("RLHF_MLFLOW_PAGES", servers.mlflow)


def find(root: Path) -> Served | None:
    """The servers of this workspace, once they answer; None where it is not served."""
    deadline = time.monotonic() + SECONDS_TO_START
    while held(root, LOCK) and time.monotonic() < deadline:
        try:
            servers = Served(**json.loads(_file(root).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            servers = None
        if servers and servers.root == str(root.resolve()):
            return servers
        time.sleep(SECONDS_BETWEEN_LOOKS)  # it is starting
    return None


def write(root: Path, api: str, mlflow: str) -> None:
    """Tell others of the servers, which answer by now."""
    beside = _file(root).with_suffix(".new")
    beside.write_text(json.dumps(asdict(Served(str(root.resolve()), api, mlflow))), encoding="utf-8")
    beside.replace(_file(root))


def forget(root: Path) -> None:
    """What was written before holds no more."""
    _file(root).unlink(missing_ok=True)


def _file(root: Path) -> Path:
    return root / "runs" / "serve" / "servers.json"
