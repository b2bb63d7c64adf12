"""Keys: where they stand, which are refused, and what listening needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf import config
from rlhf.config.serving import Key, Serving
from rlhf.errors import UserError
from rlhf.serving import server
from rlhf.serving.keys import Keys
from rlhf.serving.replies import RefusedError

PROJECT = Path(__file__).parents[2]
GOOD = "0123456789abcdef"


def settings(*keys: dict[str, Any]) -> Serving:
    usual = {"name": "app", "roles": ["ask"], "variable": None, "file": None, "requests_per_minute": None, "max_body_kib": None}
    return config.load(PROJECT / "params.yaml").serving.model_copy(update={"named_keys": [Key(**usual | key) for key in keys]})


def test_a_key_that_cannot_be_had_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    monkeypatch.setenv("APP", GOOD)
    for content, mode, remedy in (
        (GOOD, 0o640, "chmod 600"),
        (GOOD, 0o700, "chmod 600"),
        ("short", 0o600, "openssl"),
        ("a b" * 9, 0o600, "openssl"),
    ):
        path.write_text(content)
        path.chmod(mode)
        with pytest.raises(UserError, match=r"serving\.keys: app") as refused:
            Keys(tmp_path, settings({"file": "key"}))
        assert remedy in refused.value.remedy
        assert content not in str(refused.value)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        Keys(tmp_path, settings({"file": "key"}))
    with pytest.raises(UserError, match="the environment has no OTHER"):
        Keys(tmp_path, settings({"variable": "OTHER"}))
    with pytest.raises(UserError, match="app and other are the same key"):
        Keys(tmp_path, settings({"variable": "APP"}, {"name": "other", "variable": "APP"}))


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP", GOOD)
    keys = Keys(tmp_path, settings({"variable": "APP"}))
    assert keys.caller({b"authorization": f"bearer {GOOD}".encode()}).name == "app"
    for wrong in (
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer \xff",
        f"Basic {GOOD}".encode(),
        f"Bearer {GOOD}0".encode(),
        f"Bearer {GOOD[:-1]}".encode(),
    ):
        with pytest.raises(RefusedError) as refused:
            keys.caller({b"authorization": wrong})
        assert refused.value.status == 401
    assert GOOD not in repr(vars(keys))


def test_without_keys_another_sites_page_gets_nothing(tmp_path: Path) -> None:
    keys = Keys(tmp_path, settings())
    for host in (b"localhost", b"LOCALHOST:8080", b"127.0.0.1:1", b"[::1]:80"):
        assert keys.caller({b"host": host}).name is None
    for host in (b"evil.example", b"evil.example:8080", b"127.0.0.1.evil.example", b"localhost@evil", b""):
        with pytest.raises(RefusedError) as refused:
            keys.caller({b"host": host})
        assert (refused.value.status, refused.value.code) == (403, "wrong_host")


def test_a_key_stands_in_one_place_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    key = "{name: app, roles: [ask], variable: %s, file: %s, requests_per_minute: null, max_body_kib: null}"
    both, once = key % ("APP", "app.key"), key % ("APP", "null")
    for keys, word in ((f"[{both}]", "in variable or in file"), (f"[{once}, {once}]", "app is there twice")):
        text = (PROJECT / "params.yaml").read_text()
        assert "  keys: []\n" in text
        (tmp_path / "params.yaml").write_text(text.replace("  keys: []\n", f"  keys: {keys}\n"))
        with pytest.raises(UserError, match=word):
            config.load(tmp_path / "params.yaml")


def test_others_reach_it_with_keys_alone() -> None:
    with pytest.raises(UserError, match="can be reached from elsewhere"):
        server.listen("0.0.0.0", 0, asks=False)
    server.listen("0.0.0.0", 0, asks=True).close()
    with pytest.raises(UserError, match="is no address"):
        server.listen("assistant.internal", 0, asks=True)
    with pytest.raises(UserError, match="give an address of this machine"):
        server.listen("192.0.2.1", 0, asks=True)


def test_limits_let_through_so_many_and_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP", GOOD)
    now = [100.0]
    monkeypatch.setattr("rlhf.serving.keys.time.monotonic", lambda: now[0])
    caller = Keys(tmp_path, settings({"variable": "APP", "requests_per_minute": 60})).of(GOOD.encode())
    for _ in range(60):
        caller.count()
    with pytest.raises(RefusedError) as refused:
        caller.count()
    assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "2"})
    now[0] += 2
    caller.count()
    caller.count()
    with pytest.raises(RefusedError):
        caller.count()
