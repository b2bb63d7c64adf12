"""Secrets are kept out of what is printed, logged and stored."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# postgresql://user:PASSWORD@host; a slash in a password is written %2F
IN_ADDRESS = re.compile(r"(?P<before>://[^\s:/@]*:)[^\s/]+(?P<after>@)")
IN_QUERY = re.compile(r"(?P<before>[?&][^\s=&]*(?:password|secret|token|key)=)[^\s&'\"]+", re.IGNORECASE)
VARIABLE = re.compile(r"(PASSWORD|SECRET|TOKEN|KEY)$")
SHORTEST = 8  # characters: a shorter value may well be an ordinary word


def redact(text: str) -> str:
    """The text without passwords of addresses, and without the values of the environment's passwords, tokens and keys."""
    text = IN_ADDRESS.sub(rf"\g<before>{HIDDEN}\g<after>", text)
    text = IN_QUERY.sub(rf"\g<before>{HIDDEN}", text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return text


def holds_password(address: str) -> bool:
    """Whether an address carries a password."""
    return bool(IN_ADDRESS.search(address) or IN_QUERY.search(address))
