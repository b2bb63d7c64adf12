"""Which version answers a request, where several could: a conversation stays with its arm."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rlhf.config.serving import Traffic as Shares
from rlhf.feedback.hashes import Hashes
from rlhf.serving.bodies import Asked, ChatBody, CompletionBody
from rlhf.serving.replies import RefusedError
from rlhf.serving.versions import CANDIDATE, CHAMPION, Version, Versions


@dataclass(frozen=True)
class Arm:
    """A version, and the alias that it is asked by; None where a version was named."""

    version: Version
    alias: str | None


class Traffic:
    """Sends a share of the conversations to the candidate.

    Args:
        versions: that answer.
        hashes: that share them out.
        shares: of the candidate.
    """

    def __init__(self, versions: Versions, hashes: Hashes, shares: Shares) -> None:
        self._versions, self._hashes, self._shares = versions, hashes, shares

    def arm(self, body: Asked, wanted: str | None) -> Arm | None:
        """Who answers; None where the model that is named is not served.

        Args:
            body: what the client sent.
            wanted: the alias that an administrator asks for in the place of the one that is drawn.

        Raises:
            RefusedError: there is no such alias, or the request names a version besides.
        """
        if wanted is not None:
            return self._wanted(body, wanted)
        candidate = self._versions.by_alias.get(CANDIDATE)
        drawn = candidate and self._shares.candidate and body.model == self._versions.model
        if candidate and drawn and self._hashes.share("arm", _conversation(body)) < self._shares.candidate:
            return Arm(candidate, CANDIDATE)
        version, alias = self._versions.find(body.model)
        return Arm(version, alias) if version else None

    def beside(self, arm: Arm) -> Version | None:
        """The candidate, where it can write a shadow beside an answer of the champion's."""
        candidate = self._versions.by_alias.get(CANDIDATE)
        return candidate if arm.alias == CHAMPION and candidate is not arm.version else None

    def _wanted(self, body: Asked, alias: str) -> Arm:
        if body.model != self._versions.model:
            raise RefusedError(400, f"x-arm is for model {self._versions.model} alone, but {body.model!r} is asked", "invalid_value")
        if version := self._versions.by_alias.get(alias):
            return Arm(version, alias)
        raise RefusedError(404, f"x-arm: no version is served as {alias!r}", "model_not_found")


def _conversation(body: Asked) -> str:
    """What a conversation is known by: its id, or else its user, or else what it began with, which each of its requests repeats."""
    if body.conversation or body.user:
        return f"conversation {body.conversation}" if body.conversation else f"user {body.user}"
    if isinstance(body, ChatBody):
        turns = [message.plain for message in body.messages]
        first = next(number for number, turn in enumerate(turns) if turn["role"] == "user")
        return json.dumps(turns[: first + 1])
    assert isinstance(body, CompletionBody)
    return f"text {body.prompt}"
