"""A params.yaml of an earlier version of the project: what it lacks comes from a preset, what is known no more is taken out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from rlhf import config
from rlhf.errors import UserError


def fill(raw: Any, preset: Any, plain: Callable[[], object], shown: Callable[[object], str]) -> list[str]:
    """Give a params.yaml the keys that it lacks. Values that it has stay as they are.

    Args:
        raw: its content as ruamel.yaml reads it, with comments; changed in place.
        preset: that of a preset. In a list, the first entry with the key says what those of the file lack.
        plain: the content as it would be read again.
        shown: a value in words.

    Returns:
        The changes, for people.

    Raises:
        UserError: sections are one and the same by an anchor, so that what one gets the other would have, too.
    """
    _check_apart(raw, {})
    done: list[str] = []
    while True:  # what a new section lacks is seen once the section is there
        lacking, unknown = config.out_of_place(plain())
        changes = [f"{_name(key)} {shown(_taken_out(raw, key))}: known no more, taken out" for key in unknown]
        for key in lacking:
            holder, given = _at(raw, key[:-1]), _like(preset, key[:-1], key[-1])
            if given is not None:
                _insert(holder, key[-1], copy.deepcopy(given[key[-1]]), list(given))
                changes.append(f"{_name(key)} {shown(given[key[-1]])}: from the preset")
        if not changes:
            return done
        done += changes


def _check_apart(value: Any, known: dict[int, config.Key], key: config.Key = ()) -> None:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if inner and id(value) in known:
        what = f"{_name(key)} is {_name(known[id(value)])} by an anchor of YAML"
        raise UserError(what, remedy="write its values out in the place of the alias")
    known[id(value)] = key
    for part, one in inner:
        _check_apart(one, known, (*key, part))


def _name(key: config.Key) -> str:
    return ".".join(map(str, key))


def _at(raw: Any, key: config.Key) -> Any:
    for part in key:
        raw = raw[part]
    return raw


def _taken_out(raw: Any, key: config.Key) -> object:
    return _at(raw, key[:-1]).pop(key[-1])


def _like(preset: Any, holder: config.Key, name: str | int) -> Any:
    """The mapping of the preset that stands where one of the file does, and has a key; None where there is none."""
    found = [preset]
    for part in holder:
        if isinstance(part, int):
            found = [entry for entries in found if isinstance(entries, list) for entry in entries]
        else:
            found = [mapping[part] for mapping in found if isinstance(mapping, dict) and part in mapping]
    return next((mapping for mapping in found if isinstance(mapping, dict) and name in mapping), None)


def _insert(holder: Any, name: str | int, value: object, order: list[Any]) -> None:
    """Put a key where the preset has it, but not behind the last one: that holds the empty line or the comment after the section."""
    before = order[: order.index(name)]
    place = max((i + 1 for i, known in enumerate(holder) if known in before), default=0)
    holder.insert(min(place, max(len(holder) - 1, 0)), name, value)
