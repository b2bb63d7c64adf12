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

    Raises:
        UserError: the key is empty, or others may read it.
    """

    def __init__(self, root: Path) -> None:
        given = os.environ.get(VARIABLE)
        self._key = given.encode() if given else _own_key(folder(root) / "key")

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


def _own_key(path: Path) -> bytes:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    beside = path.with_name(f"key.{secrets.token_hex(8)}")
    if not path.exists():
        beside.touch(0o600)
        beside.write_text(secrets.token_hex(32))
        try:
            path.hardlink_to(beside)  # whole, and of two that make it at once, the first one's
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path}: others may read the key of users' hashes", remedy=f"chmod 600 {path}")
    if not (key := path.read_bytes().strip()):
        raise UserError(f"{path}: the key of users' hashes is empty", remedy="restore it, or delete it and have users counted anew")
    return key
