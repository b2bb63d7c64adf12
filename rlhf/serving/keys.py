"""Who may do what: keys of serving.keys, known by their hashes, and how much each may ask."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from rlhf.config.serving import ROLES, Key, Role, Serving
from rlhf.errors import UserError
from rlhf.serving.replies import RefusedError

# what this machine calls itself: a page whose name was turned to its loopback (DNS rebinding) sends that name
LOCAL = re.compile(rb"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
SHORTEST = 16  # characters: a shorter key could be guessed


class Caller:
    """Whoever has a key; or everybody, where none is asked for.

    Args:
        name: of the key.
        roles: what it is for.
        most_bytes: of a request.
        per_minute: requests; None: any number.
    """

    def __init__(self, name: str | None, roles: Collection[Role], most_bytes: int, per_minute: int | None) -> None:
        self.name, self.roles, self.most_bytes = name, frozenset(roles), most_bytes
        self._per_minute = per_minute
        self._left, self._at = float(per_minute or 0), time.monotonic()
        self._lock = threading.Lock()

    def count(self) -> None:
        """Count a request.

        Raises:
            RefusedError: it is one too many for now.
        """
        if self._per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
            self._at = now
            if self._left < 1:
                seconds = (1 - self._left) * 60 / self._per_minute
                what = f"more than {self._per_minute} requests a minute with key {self.name}"
                raise RefusedError(429, what, "rate_limit_exceeded", headers={"retry-after": str(int(seconds) + 1)})
            self._left -= 1

    def check(self, role: Role) -> None:
        """Check that the key is for something.

        Raises:
            RefusedError: it is not.
        """
        if role not in self.roles:
            raise RefusedError(403, f"key {self.name} is not for this: it needs role {role}", "permission_denied")


class Keys:
    """The keys of a server.

    Args:
        root: the workspace, which files of keys are named from.
        settings: section serving.

    Raises:
        UserError: a key is not there, others may read it, it is too short, or two are the same.
    """

    def __init__(self, root: Path, settings: Serving) -> None:
        most = settings.max_body_kib
        self._everybody = Caller(None, ROLES, most * 1024, None)
        self._callers: dict[bytes, Caller] = {}
        for key in settings.named_keys:
            hashed = _hashed(_read(root, key))
            if known := self._callers.get(hashed):
                raise UserError(f"serving.keys: {known.name} and {key.name} are the same key", remedy="give each name a key of its own")
            self._callers[hashed] = Caller(key.name, key.roles, (key.max_body_kib or most) * 1024, key.requests_per_minute)

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Who sends a request.

        Args:
            headers: of it, names in lower case.

        Raises:
            RefusedError: a key is needed, and none or a wrong one was given; or none is, and the request names another host.
        """
        if not self._callers:
            if not LOCAL.fullmatch(headers.get(b"host", b"localhost")):
                what = "without keys this server answers to localhost and 127.0.0.1 alone, and the header host names another"
                raise RefusedError(403, what, "wrong_host")
            return self._everybody
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not given:
            raise _unknown("a key is needed: Authorization: Bearer KEY")
        return self.of(given.strip())

    def knows(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request comes from somebody who may use the server."""
        try:
            self.caller(headers)
        except RefusedError:
            return False
        return True

    def of(self, given: bytes) -> Caller:
        """Whose key it is.

        Raises:
            RefusedError: nobody's.
        """
        hashed = _hashed(given)
        # all of them, each to its last byte: how long it takes tells nothing
        found = [caller for known, caller in self._callers.items() if hmac.compare_digest(known, hashed)]
        if not found:
            raise _unknown("this key is not known here")
        return found[0]


def _unknown(what: str) -> RefusedError:
    return RefusedError(401, what, "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _hashed(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read(root: Path, key: Key) -> bytes:
    place = f"serving.keys: {key.name}"
    if key.variable:
        if not (found := os.environ.get(key.variable, "").encode().strip()):
            raise UserError(f"{place}: the environment has no {key.variable}", remedy="set it to the key, or give the key in a file")
    else:
        path = root / str(key.file)
        try:
            status = path.stat()
            found = path.read_bytes().strip()
        except OSError as error:
            what = f"{place}: {path}: {error.strerror}"
            raise UserError(what, remedy=f"make one: (umask 077; openssl rand -hex 32 > {path})") from None
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o177:
            raise UserError(f"{place}: others may use {path} (mode {status.st_mode & 0o777:o})", remedy=f"chmod 600 {path}")
    if len(found) < SHORTEST or not found.isascii() or len(found.split()) != 1:
        what = f"{place}: the key is no word of {SHORTEST} characters or more"
        raise UserError(what, remedy="make a new one: openssl rand -hex 32")
    return found
