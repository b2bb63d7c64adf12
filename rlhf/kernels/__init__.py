"""What NVIDIA GPUs do in one kernel each, in Triton. It comes with torch's builds for CUDA; without it torch's own operations stand in."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)


@cache
def kernels(name: str) -> Any:
    """A module of this package, tried out; None where Triton is missing or finds no compiler."""
    try:
        found = import_module(f"{__name__}.{name}")
        found.try_out()
    except Exception as error:
        logger.warning("%s is by torch's own kernels, which is slower: %s", name, (str(error) or repr(error)).splitlines()[0])
        return None
    return found
