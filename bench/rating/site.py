"""The server's application at an address of its own, with no version in service: for those who rate what is there already."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import httpx
import uvicorn
from sqlalchemy import select

from rlhf.config import Params
from rlhf.feedback import pairs
from rlhf.feedback.pairs import Written
from rlhf.feedback.tables import Rating
from rlhf.serving import server
from rlhf.serving.api import create
from rlhf.serving.service import Service


class Site:
    """It answers until `end`.

    Args:
        root: of a workspace, where the record lies.
        params: of it.
    """

    def __init__(self, root: Path, params: Params) -> None:
        service = Service(root, params)
        self.record = service.ratings.record
        listener = server.listen("127.0.0.1", 0, asks=False)
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(create(service), log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        self.client = httpx.Client(base_url=self.address)

    def fill(self, prompts: Iterable[str], good: str, bad: str) -> None:
        """Add a pair of the same two answers for each prompt, the good one by the first version."""
        with self.record.writing() as session:
            for prompt in prompts:
                answers = (Written(good, "assistant/1"), Written(bad, "assistant/2"))
                pairs.add(session, "sample", [{"role": "user", "content": prompt}], answers)

    def ratings(self, rater: str) -> list[Rating]:
        """All that a rater gave, those that were taken back among them."""
        with self.record.reading() as session:
            return list(session.scalars(select(Rating).where(Rating.rater == rater).order_by(Rating.id)))

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join()
