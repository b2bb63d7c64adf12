"""Built-in functions that compare an answer with what is right: each gives 1 or 0."""

from __future__ import annotations

import json
import logging
import re
import string
import unicodedata
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import jsonschema
import referencing.jsonschema

_CHOICE = (
    r"\\boxed\{{\s*\(?({0})\)?\s*\}}",
    r"(?i:answer)\s*(?:is|:)?\s*:?\s*\**\(?({0})\)?(?!\w)",
    r"^\W*({0})\s*(?:[).:,\]]|$)",
    r"(?<!\w)({0})\W*$",
)
_DELIMITED = re.compile(r"(?<!\\)\$|\\boxed|\\[(\[]")  # mathematics that says itself where it begins
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def references(reference: Any) -> list[str]:
    """The right answers, any of which will do.

    Raises:
        ValueError: the row has none.
    """
    found = reference if isinstance(reference, list) else [reference]
    if not found or not all(isinstance(value, str | int | float) for value in found):
        raise ValueError(f"the row's reference is {reference!r}, and is to be a text, a number or a list of them")
    return [str(value) for value in found]


# ----------------------------------------------------------------------------------------------------------- mathematics


def math(answer: str, reference: Any) -> float:
    """Whether the answer's result equals the reference (library math-verify).

    Raises:
        ValueError: the reference is no mathematical value.
    """
    import math_verify

    for right in references(reference):
        gold = _gold(right)
        if not gold:
            raise ValueError(f"the row's reference {right!r} is no mathematical value")
        # the process that calls this has a time limit of its own
        if math_verify.verify(gold, _parsed(answer), timeout_seconds=None):
            return 1.0
    return 0.0


def _gold(right: str) -> list[Any]:
    """A reference's value. Bare LaTeX is read as a formula: as running text math-verify finds the first number alone, 5 in 5\\sqrt{3}."""
    with suppress(InvalidOperation):
        right = format(Decimal(right), "f")  # 1.5e3 would be a product
    return (not _DELIMITED.search(right) and _parsed(f"${right}$")) or _parsed(right)


def math_vote(answer: str) -> str:
    """The answer's result, written in one way."""
    found = _parsed(answer)
    return str(found[0]) if found else ""


def _parsed(text: str) -> list[Any]:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # else each call says that it has no time limit
    return math_verify.parse(text, parsing_timeout=None)


# ----------------------------------------------------------------------------------------------------------------- texts

# -5 is not 5, and 12.5 does not hold a 5; 1,000 is 1000
OF_NUMBERS = re.compile(r"(?<!\w)-(?=\.?\d)|(?<=\d)\.(?=\d)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def match(answer: str, reference: Any, how: Literal["exact", "normalised", "contains"] = "normalised") -> float:
    """Whether the answer is the reference.

    Args:
        how: exact, but for spaces around; normalised, without case, punctuation and English articles (as SQuAD compares), but with signs
            and points of numbers; contains: the normalised answer holds the words of the normalised reference.

    Raises:
        ValueError: there is no such way to compare.
    """
    rights = references(reference)
    if how == "exact":
        return float(answer.strip() in [right.strip() for right in rights])
    if how not in ("normalised", "contains"):
        raise ValueError(f"how is {how!r}, and is to be exact, normalised or contains")
    said = normalised(answer)
    if how == "normalised":
        return float(said in map(normalised, rights))
    return float(any(f" {normalised(right)} " in f" {said} " for right in rights))


def normalised(text: str) -> str:
    plain = THOUSANDS.sub("", unicodedata.normalize("NFKC", text).lower().replace("−", "-"))
    kept = {found.start() for found in OF_NUMBERS.finditer(plain)}
    marks = (place for place, letter in enumerate(plain) if unicodedata.category(letter).startswith("P"))
    gone = {*marks} - kept
    without = "".join(" " if place in gone else letter for place, letter in enumerate(plain))
    return " ".join(word for word in without.split() if word not in ("a", "an", "the"))


def choice(answer: str, reference: Any, letters: str = string.ascii_uppercase[:10]) -> float:
    """Whether the answer picks the right letter of a multiple choice.

    Args:
        reference: the letter, or its number from 0.
        letters: that there are to pick from.
    """
    rights = [right.strip(" ().") for right in references(reference)]
    rights = [letters[int(right)] if right.isdecimal() and right not in letters else right for right in rights]
    return float(picked(answer, letters).upper() in [right.upper() for right in rights])


def picked(answer: str, letters: str = string.ascii_uppercase[:10]) -> str:
    """The letter that an answer picks: the last boxed one, or said to be the answer, or the one that it begins or ends with."""
    for pattern in _CHOICE:
        if found := re.findall(pattern.format(f"[{re.escape(letters)}]"), answer.strip()):
            return found[-1]
    return ""


def pattern(answer: str, reference: Any = None, pattern: str | None = None) -> float:
    """Whether a regular expression is found in the answer; where it has a group `answer`, whether that is the reference.

    Args:
        pattern: the expression; None: the row's reference is it.

    Raises:
        ValueError: there is no expression.
    """
    if pattern is None and reference is None:
        raise ValueError("there is neither an option pattern, nor a reference in the row")
    found = re.search(str(reference) if pattern is None else pattern, answer, re.DOTALL)
    if found is None or pattern is None or "answer" not in found.groupdict():
        return float(found is not None)
    return match(found["answer"] or "", reference)


def json_answer(answer: str, reference: Any = None, schema: dict[str, Any] | None = None) -> float:
    """Whether the answer, or the block ```json in it, is JSON that a JSON schema allows.

    Args:
        schema: None: the row's reference is it; where there is none, all JSON will do.
    """
    wanted = reference if schema is None else schema
    if isinstance(wanted, str):
        wanted = json.loads(wanted)
    content = loaded(answer)
    if content is NOTHING:
        return 0.0
    schema = {} if wanted is None else wanted
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    # with a registry of its own it fetches no $ref from elsewhere: the schema may come from the data
    return float(validator(schema, registry=referencing.jsonschema.EMPTY_REGISTRY).is_valid(content))


NOTHING = object()  # null is JSON


def loaded(answer: str) -> Any:
    """The JSON that an answer is, or holds in a block; NOTHING where that is none."""
    fenced = _FENCED.search(answer)
    try:
        return json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return NOTHING
