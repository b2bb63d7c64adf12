"""Which versions are held when the engines' process dies over one of them."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf import config, registry
from rlhf.errors import UserError
from rlhf.serving import versions
from rlhf.serving.bodies import ChatBody
from rlhf.serving.exchange import begin
from rlhf.serving.keys import Caller
from rlhf.serving.process import UnheardError
from rlhf.serving.replies import RefusedError
from rlhf.serving.traffic import Traffic
from rlhf.serving.versions import Versions

PROJECT = Path(__file__).parents[2]


class Registry:
    """Aliases, and versions whose opening takes the process with it."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.aliases: dict[str, int] = {}
        self.deadly: set[int] = set()
        self.deaths = 0  # of the next ones that are opened
        self.unheard = self.starts_never = False  # those processes that die hear of nothing before; those that begin say no word
        self.opened: list[int] = []
        self._root = root
        patch.setattr(registry, "aliases", lambda *_: dict(self.aliases))
        patch.setattr(registry, "find", lambda _, __, number: SimpleNamespace(uri=str(number), tags={}, created=datetime.datetime.now()))
        patch.setattr(registry, "model_folder", self._folder)
        patch.setattr(versions, "EngineProcess", lambda: Process(self))

    def _folder(self, uri: str, *_: object) -> Path:
        (self._root / uri).mkdir(exist_ok=True)
        return self._root / uri


class Process:
    """In the place of the engines' process."""

    def __init__(self, known: Registry) -> None:
        self.alive, self._known, self.started = True, known, not known.starts_never
        self._killed = threading.Event()

    def open(self, folder: Path, *_: int) -> Any:
        number = int(folder.name)
        self._known.opened.append(number)
        if not self.started:
            assert self._killed.wait(60)
            raise UserError("the process of the engines has ended", remedy="")
        if number in self._known.deadly or self._known.deaths:
            self.alive, self._known.deaths = False, max(self._known.deaths - 1, 0)
            raise (UnheardError if self._known.unheard else UserError)("the process of the engines has ended", remedy="")
        return Engine(self)

    def kill(self) -> None:
        self.alive = False
        self._killed.set()

    def stop(self) -> None:
        self.alive = False


class Engine:
    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def alive(self) -> bool:
        return self._process.alive

    def close(self) -> None:
        pass


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(tmp_path, monkeypatch)


@pytest.fixture
def held(known: Registry, tmp_path: Path) -> Versions:
    return Versions(tmp_path, config.load(PROJECT / "params.yaml"))


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def serving(held: Versions) -> dict[str, int]:
    """What is answered with."""
    return {alias: version.number for alias, version in held.by_alias.items() if version.engine.alive}


def refused(held: Versions, model: str) -> tuple[int, dict[str, str]]:
    """Status and header of the reply to who asks for a model that nothing answers for."""
    traffic = Traffic(held, cast(Any, None), held.settings.traffic)
    service: Any = SimpleNamespace(versions=held, traffic=traffic, record=SimpleNamespace(takes=bool), opening=asyncio.Lock())
    body = ChatBody.model_validate({"model": model, "messages": [{"role": "user", "content": "Who?"}]})
    with pytest.raises(RefusedError) as error:
        asyncio.run(begin(service, body, Caller(None, (), 0, None), None))
    return error.value.status, error.value.headers


def test_a_candidate_that_takes_the_process_with_it_is_left_alone_and_the_champion_is_there_again(known: Registry, held: Versions) -> None:
    known.aliases, known.deadly = {"champion": 1, "candidate": 2}, {2}
    held.refresh()
    for _ in range(3):
        held.refresh()
        assert serving(held) == {"champion": 1}
    assert known.opened == [1, 2, 1]
    assert held.problems == {"candidate": "the process of the engines has ended"}
    held.stop()


def test_a_new_champion_that_takes_the_process_with_it_leaves_the_old_one(known: Registry, held: Versions) -> None:
    known.aliases = {"champion": 1}
    held.refresh()
    known.aliases, known.deadly = {"champion": 2}, {2}
    for _ in range(3):
        held.refresh()
        assert serving(held) == {"champion": 1}
    assert known.opened == [1, 2, 1]
    held.stop()


def test_what_an_alias_meant_before_is_tried_again_however_often_it_fails(known: Registry, held: Versions) -> None:
    known.aliases = {"champion": 1}
    held.refresh()
    known.aliases, known.deaths = {"champion": 2}, 3  # by version 2 itself, and twice as version 1 is opened again
    for expected in ({}, {}, {"champion": 1}, {"champion": 1}):
        held.refresh()
        assert serving(held) == expected
        assert [held.is_awaited(name) for name in ("assistant", "assistant@champion", "assistant@candidate", "assistant/1", "other")] == [
            *(True, True, False, False, False)
        ]
        if not expected:
            assert refused(held, "assistant") == (503, {"retry-after": "1"})
            assert refused(held, "other") == (404, {})
    assert known.opened == [1, 2, 1, 1, 1]
    assert held.swaps == 1  # it came back as what it was
    held.stop()


def test_the_only_one_is_tried_again_and_what_cannot_be_had_any_more_is_not_held(known: Registry, held: Versions) -> None:
    known.aliases, known.deadly = {"champion": 1}, {1}
    held.refresh()
    assert held.by_alias == {}
    known.deadly.clear()
    held.refresh()
    assert serving(held) == {"champion": 1}
    known.aliases["candidate"] = 2
    held.refresh()
    held.by_alias["champion"].engine._process.alive = False
    known.deadly.add(1)
    held.refresh()
    assert held.find("assistant")[0] is held.by_alias.get("candidate")
    held.stop()
    with pytest.raises(UserError, match="the server ends"):
        held._engines()


def test_one_that_a_dying_process_never_heard_of_is_not_to_blame(known: Registry, held: Versions) -> None:
    known.aliases = {"champion": 1}
    held.refresh()
    known.aliases, known.deaths, known.unheard = {"champion": 2}, 1, True
    held.refresh()
    assert serving(held) == {"champion": 1}
    held.refresh()
    assert serving(held) == {"champion": 2}
    assert known.opened == [1, 2, 1, 2]
    assert held.swaps == 2
    held.stop()


def test_what_was_wrong_last_is_what_is_told(known: Registry, held: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known.aliases = {"champion": 1}
    held.refresh()
    known.aliases, known.deaths = {"champion": 2}, 1
    held.refresh()
    assert (serving(held), held.problems) == ({"champion": 1}, {"champion": "the process of the engines has ended"})
    (tmp_path / "2" / "model").touch()  # and then it is damaged, and the process dies of something else
    cast(Any, held)._process.kill()
    find = registry.find

    def damaged(*given: Any) -> Any:
        if given[2] == 2:
            error = registry.DamagedError("a file is missing", remedy="bring it back")
            error.folder = tmp_path / "2"
            raise error
        return find(*given)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "find", damaged)
        for _ in range(2):
            held.refresh()
            assert (serving(held), held.problems) == ({"champion": 1}, {"champion": "a file is missing"})
    (tmp_path / "2" / "model").unlink()  # as it was
    held.refresh()
    assert (serving(held), held.problems) == ({"champion": 2}, {})
    held.stop()


def test_the_version_before_answers_where_the_one_in_service_cannot_be_opened_again(known: Registry, held: Versions) -> None:
    for number in (1, 2, 3):
        known.aliases = {"champion": number}
        held.refresh()
    known.deadly, known.deaths = {3}, 1  # it answered, and cannot be opened any more
    cast(Any, held)._process.kill()
    for _ in range(3):
        held.refresh()
    assert serving(held) == {"champion": 2}
    known.deadly.add(2)
    cast(Any, held)._process.kill()
    held.refresh()
    assert serving(held) == {}
    gone = "the process of the engines has ended"
    assert held.problems == {"champion": f"{gone}; and assistant/2, which it meant before: {gone}"}
    known.deadly.clear()
    known.aliases = {"champion": 1}
    held.refresh()
    assert (serving(held), held.problems) == ({"champion": 1}, {})
    held.stop()


def test_a_version_that_was_withdrawn_does_not_come_back_by_itself(known: Registry, held: Versions) -> None:
    for number in (1, 2, 1):
        known.aliases = {"champion": number}
        held.refresh()
    known.deadly.add(1)
    cast(Any, held)._process.kill()
    for _ in range(2):
        held.refresh()
    assert serving(held) == {}
    held.stop()


def test_the_end_does_not_wait_for_a_process_that_has_not_started(known: Registry, held: Versions) -> None:
    held.settings = held.settings.model_copy(update={"refresh_seconds": 0.01})
    known.aliases = {"champion": 1}
    held.start()
    known.starts_never = True
    cast(Any, held)._process.kill()
    until(lambda: known.opened != [1])
    ending = threading.Thread(target=held.stop, daemon=True)
    ending.start()
    ending.join(30)
    assert not ending.is_alive()


def test_one_that_ends_before_it_has_begun_waits_for_nothing(known: Registry, held: Versions) -> None:
    known.aliases, known.starts_never = {"champion": 1, "candidate": 2}, True
    beginning = threading.Thread(target=held.start, daemon=True)
    beginning.start()
    until(lambda: known.opened)
    held.give_up()
    held.stop()
    beginning.join(30)
    assert not beginning.is_alive()
    assert known.opened == [1]
