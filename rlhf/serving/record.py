"""Which answers are recorded, and what of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.config import Params
from rlhf.feedback import database
from rlhf.feedback.database import Database, Kept
from rlhf.feedback.forgetting import knows_users
from rlhf.feedback.hashes import Hashes
from rlhf.feedback.recorder import Recorder
from rlhf.serving.bodies import Asked, ChatBody, CompletionBody
from rlhf.serving.replies import RefusedError
from rlhf.serving.requests import Request
from rlhf.serving.versions import Version

logger = logging.getLogger(__name__)


@dataclass
class Written:
    """An answer in the making, as its events tell of it."""

    text: str = ""
    finish: str = "cancelled"
    tokens: int = 0
    seconds: float = 0.0


class Record:
    """Answers of one server, on their way to the database.

    Args:
        root: the workspace.
        params: of it.
    """

    def __init__(self, root: Path, params: Params) -> None:
        self._keep = params.serving.keep
        self.hashes = Hashes(root)

        def connect() -> Database:
            self.hashes.keep()  # its folder may have gone, and the key with it
            found = database.connect(root, params)
            with found.reading() as session:
                if self.hashes.made and knows_users(session):
                    logger.error("record: feedback/key was missing, and is a new one: `rlhf feedback forget` finds nobody who asked before")
            self.hashes.made = False
            return found

        self.kept = Kept(connect)
        self.recorder = Recorder(self.kept, days=params.serving.keep_days)

    def takes(self, body: Asked) -> bool:
        """Whether the answers to a request are recorded.

        Raises:
            RefusedError: it asks for what is not done here.
        """
        if body.store and self._keep == "none":
            raise RefusedError(400, "store: nothing is recorded here (serving.keep is none)", "invalid_value", "store")
        return body.store is True or (self._keep == "all" and body.store is None)

    def of_request(self, body: Asked, request: Request, number: int, version: Version) -> dict[str, Any]:
        """What all answers to a prompt have in common.

        Args:
            body: what the client sent.
            request: what the engine was asked.
            number: of the prompt in the body.
            version: that answered.
        """
        prompt = body.prompts[number] if isinstance(body, CompletionBody) else None
        return {
            "conversation": body.conversation and self.hashes.of("conversation", body.conversation),
            "user": body.user and self.hashes.of("user", body.user),
            "messages": [message.plain for message in body.messages] if isinstance(body, ChatBody) else None,
            "prompt": version.engine.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt,
            "asked": body.model,
            "sampling": {
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_tokens": request.max_tokens,
                "stop": list(request.stops),
            },
            "prompt_tokens": len(request.prompt),
            "consented": body.store is True,
        }

    def put(self, common: dict[str, Any], reply: str, choice: int, version: Version, seed: int, written: Written, **more: Any) -> None:
        """Have an answer recorded.

        Args:
            common: of its request.
            reply: its id.
            choice: number of the answer in the reply.
            version: that wrote it.
            seed: of the answer.
            written: the answer.
            more: columns besides.
        """
        own = {
            "reply": reply,
            "choice": choice,
            "at": datetime.now(UTC),
            "text": written.text,
            "version": version.name,
            "digest": version.digest,
            "seed": seed % 2**63,
            "finish": written.finish,
            "answer_tokens": written.tokens,
            "seconds": written.seconds,
        }
        empty = {"key": None, "arm": None, "correlation": None, "shadow": False}  # rows of one insert have the same columns
        self.recorder.put(empty | common | own | more)
