"""The functions that answers are scored by: built-in ones by name, the user's out of a file, and how they are called."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.rewards import answers, penalties
from rlhf.rewards.instructions import instructions

Function = Callable[..., Any]
ASKED = ("prompt", "answer", "reference", "columns")  # what a function may take; its other parameters are options
BUILT_IN: dict[str, Function] = {
    "choice": answers.choice,
    "instructions": instructions,
    "json": answers.json_answer,
    "length": penalties.length,
    "match": answers.match,
    "math": answers.math,
    "pattern": answers.pattern,
    "repetition": penalties.repetition,
}
# Libraries that take a while to import: before the first call, whose time limit they would use up.
_SLOW = {"math": "math_verify", "instructions": "py3langid"}
# What two answers must have in common to be one result, where a majority of them is asked for.
VOTES: dict[str, Callable[[str], str]] = {"math": answers.math_vote, "choice": answers.picked}


def load(root: Path, function: str, kept: Path | None = None) -> Function:
    """A built-in function, or that of FILE.py:NAME below a folder; whatever the file raises comes through.

    Args:
        kept: where a copy of FILE.py may be, which is then read in its place.

    Raises:
        AttributeError: the file has no such function.
    """
    if function in _SLOW:
        importlib.import_module(_SLOW[function])
    if function in BUILT_IN:
        return BUILT_IN[function]
    file, _, name = function.rpartition(":")
    specification = importlib.util.spec_from_file_location(f"reward functions of {file}", root / file)
    assert specification
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look there for the types of their fields
    content = source(root, file, kept).read_bytes()
    exec(compile(content, root / file, "exec", dont_inherit=True), module.__dict__)
    found = getattr(module, name, None)
    if not callable(found):
        raise AttributeError(f"{file} has no function {name}")
    return found


def source(root: Path, file: str, kept: Path | None) -> Path:
    """What is read of a function's file: the copy that is kept of it, where there is one."""
    return kept / file if kept and (kept / file).is_file() else root / file


def check_options(function: Function, options: Mapping[str, Any]) -> None:
    """Check that a function takes these options, and lacks none.

    Raises:
        TypeError: it does not.
    """
    inspect.signature(function).bind(**dict.fromkeys(_taken(function)), **options)


def _taken(function: Function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(ASKED)
    return [parameter.name for parameter in parameters if parameter.name in ASKED]


def call(function: Function, options: Mapping[str, Any], asked: Mapping[str, Any]) -> float:
    """The score of an answer.

    Raises:
        ValueError: what the function gives is no number.
    """
    value = function(**{name: asked[name] for name in _taken(function)}, **options)
    value = value.item() if hasattr(value, "item") else value  # of numpy and torch
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"it gave {value!r:.200}, and is to give a number")
    return float(value)
