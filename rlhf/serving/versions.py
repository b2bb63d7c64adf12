"""The versions in service: which are held ready, and which of them a name means. Aliases are followed as they move."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf import registry
from rlhf.config import Params
from rlhf.errors import UserError, first_line
from rlhf.serving.process import EngineClient, EngineProcess, UnheardError

logger = logging.getLogger(__name__)
NAME = re.compile(r"(?P<model>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>[1-9]\d{0,8}))?", re.ASCII)

SECONDS_BETWEEN_LOOKS = 1.0  # whether the process that is waited for at the end has started
SECONDS_BETWEEN_TRIES = 600.0  # of a version that cannot be opened: there may have been no memory for it, say
CHAMPION, CANDIDATE = "champion", "candidate"


@dataclass(frozen=True)
class Version:
    """One that answers."""

    name: str  # assistant/3
    number: int
    digest: str  # SHA-256 of its list of files, as the registry knows them
    created: int  # seconds
    engine: EngineClient

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.digest[:12]}"


@dataclass(frozen=True)
class _Failed:
    """A version that could not be opened: to read and check its files again would cost what opening does, and fail again."""

    what: str
    folder: Path
    files: object  # as they were
    until: float

    @property
    def holds(self) -> bool:
        return time.monotonic() < self.until and _stamp(self.folder) == self.files


class Versions:
    """Versions that answer. A new one is opened beside those before, which answer what they took and then go.

    Args:
        root: the workspace.
        params: of it.
        engines: the process that answers, where it has been started already.
    """

    def __init__(self, root: Path, params: Params, engines: EngineProcess | None = None) -> None:
        self._root, self._params, self._process = root, params, engines
        self.model, self.settings = params.promote.model, params.serving
        self.by_alias: Mapping[str, Version] = {}
        self.problems: dict[str, str] = {}  # what is wrong, by alias or place
        self.swaps = 0
        self._by_number: Mapping[int, Version] = {}  # asked for by their numbers
        self._asked: dict[int, float] = {}  # when last
        self._failed: dict[int, _Failed] = {}
        self._pointed: Mapping[str, int] = {}
        self._meant: dict[str, tuple[int, ...]] = {}  # by alias, what was opened for it last, and the older one that it meant before
        self._served: dict[str, int] = {}  # by alias, what answered last: it may come back after nothing did
        self._changing = threading.Lock()
        self._stopping = threading.Event()
        self._following = threading.Thread(target=self._follow, name="versions", daemon=True)

    def start(self) -> None:
        """Open what the aliases point at, and follow them from now on."""
        self.refresh()
        self._following.start()

    def give_up(self) -> None:
        """Open nothing any more, and have what is being opened fail: the server is to end before it has begun."""
        self._stopping.set()
        if self._process:
            self._process.kill()

    def stop(self) -> None:
        """Answer what was taken, and close."""
        self._stopping.set()
        while self._following.is_alive():
            if self._process and not self._process.started:
                self._process.kill()  # it answers nobody yet, and what waits for it would wait for its start
            self._following.join(SECONDS_BETWEEN_LOOKS)
        for version in self._all():
            version.engine.close()
        if self._process:
            self._process.stop()

    def _engines(self) -> EngineProcess:
        """The process of the engines; a new one where it has died.

        Raises:
            UserError: the server ends.
        """
        if self._stopping.is_set():
            raise UserError("the server ends", remedy="ask the next one")
        if self._process is None or not self._process.alive:
            self._process = EngineProcess()
        return self._process

    def find(self, name: str) -> tuple[Version | None, str | None]:
        """The version that a name means, None where it is none that is held ready; and the alias by which it is meant, if by one."""
        match = NAME.fullmatch(name)
        if match is None or match["model"] != self.model:
            return None, None
        if match["number"]:
            return self._numbered(int(match["number"])), None
        by_alias = self.by_alias  # which may be another one in a moment
        alias = match["alias"] or next((alias for alias in self.settings.aliases if alias in by_alias), None)
        return by_alias.get(alias or ""), alias

    def is_awaited(self, name: str) -> bool:
        """Whether the registry has a version for an alias that is served, though it may not be ready to answer."""
        match = NAME.fullmatch(name)
        if match is None or match["model"] != self.model or match["number"]:
            return False
        return any(alias in self._pointed for alias in self.settings.aliases if match["alias"] in (None, alias))

    def open(self, name: str) -> Version | None:
        """The version that a number means, opened where it is not held ready; the one asked longest ago goes for it. It takes seconds.

        Raises:
            UserError: it cannot be opened.
        """
        match = NAME.fullmatch(name)
        if match is None or match["model"] != self.model or not match["number"] or not self.settings.more_versions:
            return None
        number = int(match["number"])
        if not self._is_registered(number):
            return None
        with self._changing:
            if known := self._numbered(number):
                return known
            version = self._opened(number)
            before = {each: held for each, held in self._by_number.items() if held.engine.alive}
            newest_first = sorted(before, key=lambda each: self._asked.get(each, 0.0), reverse=True)
            self._by_number = {number: version} | {each: before[each] for each in newest_first[: self.settings.more_versions - 1]}
            self._close(before.values())
        return version

    def _is_registered(self, number: int) -> bool:
        try:
            return number in {entry.number for entry in registry.versions(self._root, self._params)}
        except Exception as error:  # of whatever kind MLflow has
            raise UserError(f"the registry does not answer: {first_line(error)}", remedy="try again later") from None

    def _numbered(self, number: int) -> Version | None:
        found = next((version for version in self._all() if version.number == number), None)
        if found:
            self._asked[number] = time.monotonic()
        return found

    @property
    def names(self) -> dict[str, Version]:
        """All names that mean a version, and which."""
        own, _ = self.find(self.model)
        found = {self.model: own} if own else {}
        found |= {f"{self.model}@{alias}": version for alias, version in self.by_alias.items()}
        return found | {version.name: version for version in self._all()}

    def _all(self) -> list[Version]:
        """All that answer; those do not whose process has died."""
        held = {version.number: version for version in (*self.by_alias.values(), *self._by_number.values())}
        return [version for version in held.values() if version.engine.alive]

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
        with self._changing:
            self._point(pointed)

    def _point(self, pointed: Mapping[str, int]) -> None:
        if pointed != self._pointed:
            self._failed, self._pointed = {}, pointed
        before = {version.number: version for version in self._all()}
        found: dict[str, Version] = {}
        for alias in self.settings.aliases:
            if alias not in pointed:
                self._problem(alias, None)
                self._meant.pop(alias, None)
                continue
            number = pointed[alias]
            known = before | {version.number: version for version in found.values()}
            try:
                alone = not (found or self._before(alias, number))
                found[alias] = known.get(number) or self._opened(number, alone=alone)
            except UserError as error:
                held, why = self._held_on_to(alias, number, found)
                self._problem(alias, "; ".join((error.what, *why)))
                if held:
                    found[alias] = held
            else:
                self._problem(alias, None)
                self._meant[alias] = number, *self._before(alias, number)[:1]
        self._swap(found)

    def _before(self, alias: str, number: int) -> list[int]:
        """What an alias meant before a version; but no newer one, which was withdrawn: it is not to come back by itself."""
        last, *earlier = self._meant.get(alias, (number,))
        return [each for each in (last, *(one for one in earlier if one < last)) if each != number]

    def _held_on_to(self, alias: str, wanted: int, found: Mapping[str, Version]) -> tuple[Version | None, list[str]]:
        """What an alias meant before, opened anew if the process has died over what it means now; and what is wrong with what cannot be.

        Args:
            alias: whose version cannot be opened.
            wanted: the number of that.
            found: those that the aliases before it mean now.
        """
        wrong = list[str]()
        for number in self._before(alias, wanted):
            known = {version.number: version for version in (*self._all(), *found.values()) if version.engine.alive}
            try:
                return known.get(number) or self._opened(number, alone=not found), wrong
            except UserError as error:
                wrong.append(f"and {self.model}/{number}, which it meant before: {error.what}")
        return None, wrong

    def _opened(self, number: int, *, alone: bool = False) -> Version:
        """A version, ready to answer.

        Args:
            alone: none was opened just before it, for another alias.

        Raises:
            UserError: it cannot be opened.
        """
        settings, folder, process, alone = self.settings, None, None, alone and not self._all()
        if (failed := self._failed.get(number)) and failed.holds:
            raise UserError(failed.what, remedy="bring back its files, or give another version")
        self._failed.pop(number, None)
        try:
            entry = registry.find(self._root, self._params, number)
            folder = registry.model_folder(entry.uri, self._root, self._params)
            most = settings.max_prompt_tokens + settings.max_tokens
            process = self._engines()
            engine = process.open(folder, settings.slots, settings.queue, most, settings.threads)
        except Exception as error:  # of whatever kind: a version that cannot be opened must not end what is served
            what = error.what if isinstance(error, UserError) else f"version {number}: {first_line(error)}"
            # one that took the process with it is tried again at once if no other one suffers for that, or if it was not to blame
            may_try = isinstance(error, UnheardError) or (process is not None and not process.alive and alone)
            if not may_try and (found := error.folder if isinstance(error, registry.DamagedError) else folder):
                self._failed[number] = _Failed(what, found, _stamp(found), time.monotonic() + SECONDS_BETWEEN_TRIES)
            raise UserError(what, remedy="bring back its files, or give another version") from None
        digest = entry.tags.get("sha256.files", "")
        return Version(f"{self.model}/{number}", number, digest, int(entry.created.timestamp()), engine)

    def _swap(self, found: Mapping[str, Version]) -> None:
        gone = self.by_alias.values()
        for alias, version in found.items():
            before = self.by_alias.get(alias)
            if before is not version:
                logger.warning("%s@%s is %s", self.model, alias, version.name)
                self.swaps += self._served.get(alias) != version.number
                self._served[alias] = version.number
        self.by_alias = found
        self._close(gone)

    def _close(self, versions: Iterable[Version]) -> None:
        """Let go those that nothing points at any more, once they have answered what they took."""
        held = self._all()
        for version in {version.number: version for version in versions if version not in held}.values():
            _behind(version.engine.close)

    def _problem(self, place: str, what: str | None) -> None:
        if what is None:
            self.problems.pop(place, None)
        elif self.problems.get(place) != what:
            self.problems[place] = what
            logger.error("%s: %s", place, what)


def _stamp(folder: Path) -> object:
    """What changes when a file of a folder does."""
    try:
        files = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    except OSError:  # one goes at this moment
        return time.monotonic()
    return [(path, status.st_ino, status.st_size, status.st_mtime_ns) for path, status in files if not path.is_dir()]


def _behind(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
