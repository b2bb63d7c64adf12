"""tracking.json: what an MLflow run is to be, and how far MLflow has it."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlhf.locks import lock

FLOWS = Path("runs/flow")
NAME = "tracking.json"


def read(folder: Path) -> dict[str, Any]:
    """What the record in a run's folder says; nothing where there is none."""
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Record:
    """tracking.json: what the run is, and how far MLflow has it. One process at a time holds it."""

    def __init__(self, root: Path, folder: Path, *, wait: bool) -> None:
        """Read it, waiting for another process that holds it or not.

        Raises:
            UserError: another process holds it, and `wait` is off.
        """
        self.folder = folder
        self._path = folder / NAME
        self._saving = threading.Lock()
        self._held = ExitStack()
        # beside tracking.json, and deleted with it
        name = f"../{folder.parent.name}/{folder.name}/tracking"
        self._held.enter_context(lock(root, name, refuse=None if wait else f"{self._path} is in use"))
        self.values = read(folder)

    def update(self, **values: Any) -> None:
        with self._saving:
            self.values |= values
            beside = self._path.with_suffix(".new")
            beside.write_text(json.dumps(self.values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            beside.replace(self._path)

    def release(self) -> None:
        self._held.close()
