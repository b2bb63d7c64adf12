"""What a sweep knows of itself, in runs/sweeps/NAME: each file is written beside and renamed, so that a kill leaves all of it or none."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.sweep.space import Space, Values
from rlhf.workspace import snapshot

FOLDER = Path("runs/sweeps")
DONE, FAILED, OPEN = "done", "failed", "open"


@dataclass(frozen=True)
class Result:
    """What came of a point."""

    number: int
    name: str  # of its DVC experiment
    values: Values
    state: str = OPEN
    metrics: Mapping[str, float] | None = None
    seconds: float | None = None  # that the steps of its stages took, wherever they were trained
    error: str = ""
    sent: bool = False  # MLflow has it


class State:
    """The files of one sweep.

    Args:
        root: the user's workspace.
        space: of the sweep.
    """

    def __init__(self, root: Path, space: Space) -> None:
        self._root, self._space = root, space
        self.folder = root / FOLDER / space.name
        self.reference = f"refs/rlhf/sweeps/{space.name}"
        self.title = f"rlhf sweep {space.name}"  # of the commits that are its experiments

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def begun(self) -> bool:
        return (self.folder / "sweep.json").exists()

    @property
    def closed(self) -> bool:
        """Whether MLflow has all of it."""
        return (self.folder / "closed.json").exists()

    def close(self) -> None:
        self._write("closed", True)

    def open(self) -> None:
        (self.folder / "closed.json").unlink(missing_ok=True)

    def begin(self) -> dict[str, Any]:
        """What the sweep began with: identity, moment, the commit that was checked out, and one of the workspace as it stood.

        Raises:
            UserError: it is new, and experiments of the user's own have its names.
        """
        if (known := self._read("sweep")) is None:
            self._check_names()
            at = int(time.time() * 1000)
            revision = snapshot.keep(self._root, self.reference, f"sweep {self._space.name}: the workspace as it stood")
            known = {"record": uuid.uuid4().hex, "started": at, "head": snapshot.head(self._root), "revision": revision}
            self._write("sweep", known)
        return dict(known)

    def _check_names(self) -> None:
        """A point takes the place of an earlier one of the same name, but of nothing else."""
        names = re.compile(rf"{self._space.name}-\d+")
        for name, title in snapshot.titled(self._root, snapshot.experiments(snapshot.head(self._root) or "")):
            if names.fullmatch(name) and not title.startswith(f"{self.title}:"):
                what = f"an experiment of this commit has the name {name}, and is not of sweep {self._space.name}"
                raise UserError(what, remedy=f"give the sweep another name, or `dvc exp rename {name} OTHER`, or `dvc exp remove {name}`")

    def forget(self) -> None:
        """Delete all that is known, so that the sweep begins anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        snapshot.forget(self._root, self.reference)

    def result(self, key: str, values: Values) -> Result:
        """What is known of a point; one that is new gets the next number."""
        numbers = self._read("numbers") or {}
        if key not in numbers:
            numbers[key] = len(numbers) + 1
            self._write("numbers", numbers)
        number = numbers[key]
        known = self._read(f"points/{number}")
        return Result(**known) if known else Result(number, f"{self._space.name}-{number}", dict(values))

    def save(self, result: Result) -> Result:
        self._write(f"points/{result.number}", asdict(result))
        return result

    def open_again(self, result: Result) -> Result:
        """A failed point is to be tried once more."""
        return self.save(replace(result, state=OPEN, error="", sent=False))

    def log(self, name: str) -> Path:
        path = self.folder / "logs" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def proposals(self) -> list[list[Values]]:
        """The batches that were proposed for this space so far."""
        return list((self._read("proposals") or {}).get(self._asked, []))

    def propose(self, batch: list[Values]) -> None:
        known = self._read("proposals") or {}
        known.setdefault(self._asked, []).append(batch)
        self._write("proposals", known)

    @property
    def _asked(self) -> str:
        # a sweep that is given more points goes on with those that it has
        asked = self._space.model_dump(mode="json", exclude={"points", "name"})
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    def add_seconds(self, stage: str, fingerprint: str, seconds: float) -> None:
        """Note how long the steps of a stage took."""
        self._write(f"seconds/{stage}-{fingerprint}", seconds)

    def seconds(self, stage: str, fingerprint: str) -> float | None:
        return self._read(f"seconds/{stage}-{fingerprint}")

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: Any) -> None:
        write(self.folder / f"{name}.json", json.dumps(content, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


Say = Callable[[str], None]
