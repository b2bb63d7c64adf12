"""The versions in service: which are held ready, and which of them a name means. Aliases are followed as they move."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf import registry
from rlhf.config import Params
from rlhf.errors import UserError, first_line
from rlhf.serving.engine import Engine, Users
from rlhf.serving.writer import Writer

logger = logging.getLogger(__name__)
NAME = re.compile(r"(?P<model>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>\d{1,9}))?")

CHAMPION, CANDIDATE = "champion", "candidate"


@dataclass(frozen=True)
class Version:
    """One that answers."""

    name: str  # assistant/3
    number: int
    digest: str  # SHA-256 of its list of files, as the registry knows them
    created: int  # seconds
    engine: Engine

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.digest[:12]}"


class Versions:
    """Versions that answer. A new one is opened beside those before, which answer what they took and then go.

    Args:
        root: the workspace.
        params: of it.
    """

    def __init__(self, root: Path, params: Params) -> None:
        self._root, self._params = root, params
        self.model, self.settings = params.promote.model, params.serving
        self.by_alias: Mapping[str, Version] = {}
        self.problems: dict[str, str] = {}  # what is wrong, by alias or place
        self.swaps = 0
        self._users = Users()
        self._stopping = threading.Event()
        self._following = threading.Thread(target=self._follow, name="versions", daemon=True)

    def start(self) -> None:
        """Open what the aliases point at, and follow them from now on."""
        self.refresh()
        self._following.start()

    def stop(self) -> None:
        """Answer what was taken, and close."""
        self._stopping.set()
        self._following.join()
        for version in self._all():
            version.engine.close()

    def find(self, name: str) -> tuple[Version | None, str | None]:
        """The version that a name means, None where it is none that is held ready; and the alias by which it is meant, if by one."""
        match = NAME.fullmatch(name)
        if match is None or match["model"] != self.model:
            return None, None
        if match["number"]:
            return next((version for version in self._all() if version.number == int(match["number"])), None), None
        by_alias = self.by_alias  # which may be another one in a moment
        alias = match["alias"] or next((alias for alias in self.settings.aliases if alias in by_alias), None)
        return by_alias.get(alias or ""), alias

    @property
    def names(self) -> dict[str, Version]:
        """All names that mean a version, and which."""
        own, _ = self.find(self.model)
        found = {self.model: own} if own else {}
        found |= {f"{self.model}@{alias}": version for alias, version in self.by_alias.items()}
        return found | {version.name: version for version in self._all()}

    def _all(self) -> list[Version]:
        return list({version.number: version for version in self.by_alias.values()}.values())

    def _follow(self) -> None:
        while not self._stopping.wait(self.settings.refresh_seconds):
            self.refresh()

    def refresh(self) -> None:
        """Look where the aliases point; what cannot be opened is not served, and its alias means what it meant before."""
        try:
            pointed = registry.aliases(self._root, self._params)
        except Exception as error:  # of whatever kind: what is served is served on
            self._problem("registry", first_line(error))
            return
        self._problem("registry", None)
        before = {version.number: version for version in self._all()}
        found: dict[str, Version] = {}
        for alias in self.settings.aliases:
            if alias not in pointed:
                self._problem(alias, None)
                continue
            number = pointed[alias]
            known = before | {version.number: version for version in found.values()}
            if version := known.get(number) or self._opened(alias, number):
                found[alias] = version
                self._problem(alias, None)
            elif alias in self.by_alias:
                found[alias] = self.by_alias[alias]
        self._swap(found)

    def _opened(self, alias: str, number: int) -> Version | None:
        try:
            entry = registry.find(self._root, self._params, number)
            folder = registry.model_folder(entry.uri, self._root, self._params)
            settings = self.settings
            writer = Writer(folder, settings.slots, settings.max_prompt_tokens + settings.max_tokens)
            engine = Engine(writer, settings.slots, settings.queue, settings.threads, self._users)
        except Exception as error:  # a version that cannot be opened must not end what is served
            self._problem(alias, error.what if isinstance(error, UserError) else f"version {number}: {first_line(error)}")
            return None
        digest = entry.tags.get("sha256.files", "")
        return Version(f"{self.model}/{number}", number, digest, int(entry.created.timestamp()), engine)

    def _swap(self, found: Mapping[str, Version]) -> None:
        gone = [version for version in self._all() if version not in found.values()]
        for alias, version in found.items():
            if self.by_alias.get(alias) is not version:
                logger.warning("%s@%s is %s", self.model, alias, version.name)
                self.swaps += 1
        self.by_alias = found
        for version in gone:
            _behind(version.engine.close)

    def _problem(self, place: str, what: str | None) -> None:
        if what is None:
            self.problems.pop(place, None)
        elif self.problems.get(place) != what:
            self.problems[place] = what
            logger.error("%s: %s", place, what)


def _behind(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
