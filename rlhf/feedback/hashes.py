"""Users and conversations by keyed hashes: who has the record alone cannot tell who asked."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from rlhf.errors import UserError
from rlhf.feedback.database import folder

VARIABLE = "RLHF_HASH_KEY"
BITS = 52  # of a hash, for a share: a float holds them exactly


class Hashes:
    """Keyed hashes of a workspace. Its key is RLHF_HASH_KEY, else feedback/key, which is made where it is missing.

    Args:
        root: the workspace.
        new: whether it is made.

    Raises:
        UserError: the key is empty, or others may read it; or it is missing.
    """

    def __init__(self, root: Path, *, new: bool = True) -> None:
        self._given, self._path = os.environ.get(VARIABLE), folder(root) / "key"
        if not (self._given or new or self._path.exists()):
            what = f"{self._path}: the key of users' hashes is missing, and a new one would find nobody"
            raise UserError(what, remedy=f"restore it, or give it as {VARIABLE}")
        self.made = not (self._given or self._path.exists())  # whoever was named before is found no more
        self._key = secrets.token_hex(32).encode()
        self.keep()

    def keep(self) -> None:
        """See that the key is where it is looked for: written where the file has gone, read where there is one.

        Raises:
            UserError: the key is empty, or others may read it; or it can be neither read nor written.
        """
        try:
            self._key = self._given.encode() if self._given else _own_key(self._path, self._key)
        except OSError as error:
            what = f"the key of users' hashes can be neither read nor written: {error}"
            raise UserError(what, remedy=f"see to {self._path}, or give the key as {VARIABLE}") from None

    def of(self, kind: str, name: str) -> str:
        """The hash of a name, in 64 hexadecimal digits.

        Args:
            kind: of name: a user and a conversation of the same name have nothing to do with each other.
            name: that the client gave.
        """
        return hmac.new(self._key, f"{kind}\0{name}".encode(), hashlib.sha256).hexdigest()

    def share(self, kind: str, name: str) -> float:
        """A number below 1 and not below 0 that is the name's own, spread evenly over names."""
        return int(self.of(kind, name), 16) % 2**BITS / 2**BITS


def _own_key(path: Path, key: bytes) -> bytes:
    """The key in a file, where the one given is written if there is none."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    beside = path.with_name(f"key.{secrets.token_hex(8)}")
    if not path.exists():
        beside.touch(0o600)
        beside.write_bytes(key)
        try:
            path.hardlink_to(beside)  # whole, and of two that make it at once, the first one's
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path}: others may read the key of users' hashes", remedy=f"chmod 600 {path}")
    if not (found := path.read_bytes().strip()):
        raise UserError(f"{path}: the key of users' hashes is empty", remedy="restore it, or delete it and have users counted anew")
    return found
