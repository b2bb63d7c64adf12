"""What a terminal without Unicode shows instead: nothing fails over a character of a message."""

from __future__ import annotations

import codecs
import io
import sys

ALIKE = {"—": "-", "–": "-", "−": "-", "…": "...", "≥": ">=", "≤": "<=", "→": "->", "←": "<-", "×": "x", "·": "*", "½": "1/2", "≈": "~"}


def say_anything() -> None:
    """Have standard output and standard error write what their encoding lacks in characters that it has."""
    codecs.register_error("alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="alike")


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ALIKE.get(character, "?") for character in error.object[error.start : error.end]), error.end
