"""What a terminal without Unicode shows instead: nothing fails over a character of a message."""

from __future__ import annotations

import codecs
import io
import sys

ALIKE = {"—": "-", "–": "-", "−": "-", "…": "...", "≥": ">=", "≤": "<=", "→": "->", "←": "<-", "×": "x", "·": "*", "½": "1/2", "≈": "~"}


def say_anything() -> None:
    """Have standard output and standard error write what their encoding lacks in characters that it has; and any input be read."""
    codecs.register_error("alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="alike")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ALIKE.get(character, "?") for character in error.object[error.start : error.end]), error.end
