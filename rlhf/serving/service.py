"""The parts of one server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rlhf.config import Params
from rlhf.serving.counts import Counts
from rlhf.serving.encoding import encoded
from rlhf.serving.ingesting import Ratings
from rlhf.serving.keys import Keys
from rlhf.serving.mailbox import Bell
from rlhf.serving.process import EngineProcess
from rlhf.serving.record import Record
from rlhf.serving.shadows import Shadows
from rlhf.serving.traffic import Traffic
from rlhf.serving.versions import Versions


class Service:
    """What requests are answered by.

    Args:
        root: the workspace.
        params: of it.
        engines: the process that answers, where it has been started already.

    Raises:
        UserError: a key cannot be had.
    """

    def __init__(self, root: Path, params: Params, engines: EngineProcess | None = None) -> None:
        self.settings = params.serving
        self.keys = Keys(root, params.serving)
        self.versions = Versions(root, params, engines)
        self.opening = asyncio.Lock()
        self.record = Record(root, params)
        self.ratings = Ratings(root, params, self.record.kept)
        self.counts = Counts(self.versions, self.record.recorder, lambda: self.problems | self.warnings)
        self.traffic = Traffic(self.versions, self.record.hashes, params.serving.traffic)
        self.shadows = Shadows(self.versions, self.record, self.counts, params.serving.traffic, encoded)

    def start(self) -> None:
        """In the loop that answers."""
        self.bell = Bell()
        self.versions.start()
        self.ratings.start()

    def stop(self) -> None:
        """Answer what was taken, and record it."""
        self.shadows.stop()
        self.versions.stop()
        self.shadows.join()
        self.record.recorder.stop()
        self.ratings.stop()

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong, by place."""
        others = {"record": self.record.recorder.problem, "ratings": self.ratings.problem}
        return self.versions.problems | {place: what for place, what in others.items() if what}

    @property
    def warnings(self) -> dict[str, str]:
        """What does not happen, and should."""
        shadow = self.shadows.warning
        return {"shadow": shadow} if shadow else {}
