"""Pairs of answers to be rated: where they come from. Each is there once, however often it is brought.

Answers that were cut off make none that is trained on: one that won would be learnt with an end where it has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session, aliased

from rlhf import registry
from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.feedback.tables import WHOLE, Answer, Dialogue, Pair, Source
from rlhf.job import read_lines

MOST_AT_ONCE = 300  # pairs: others wait to write
GIVEN = "given"  # in the place of a version: nobody's
# what str.strip takes away: pairs that the query brings and `add` takes for none would come again and again, and hide those after them
BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))


@dataclass(frozen=True)
class Written:
    """An answer, and what is known of it."""

    text: str
    version: str
    seed: int | None = None
    answer: int | None = None  # where it is recorded


def add(
    session: Session,
    source: Source,
    prompt: Dialogue,
    answers: tuple[Written, Written],
    sampling: Mapping[str, Any] | None = None,
    gold: str | None = None,
) -> bool:
    """Add a pair; whether it is new. Answers that read alike are none."""
    first, second = answers
    if first.text.strip() == second.text.strip():
        return False
    # two users' same words are two pairs: what one of them has forgotten is the other's still
    content = [prompt, *sorted([one.text, one.version, one.answer] for one in answers)]
    name = f"{source}/{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"
    if session.scalar(select(Pair.id).where(Pair.name == name)) is not None:
        return False
    session.add(
        Pair(
            name=name,
            source=source,
            prompt=prompt,
            first_text=first.text,
            first_version=first.version,
            first_seed=first.seed,
            first_answer=first.answer,
            second_text=second.text,
            second_version=second.version,
            second_seed=second.seed,
            second_answer=second.answer,
            sampling=dict(sampling) if sampling else None,
            gold=gold,
        )
    )
    session.flush()
    return True


def add_all(session: Session, source: Source, prompt: Dialogue, answers: Iterable[Written], sampling: Mapping[str, Any]) -> int:
    """Add each answer beside each other one; how many pairs are new."""
    return sum(add(session, source, prompt, pair, sampling) for pair in combinations(answers, 2))


def from_shadows(session: Session) -> int:
    """Add answers that a shadow was written beside, with it, some hundreds at most; how many pairs are new."""
    shadow = aliased(Answer)
    known = exists().where(Pair.second_answer == shadow.id)
    found = session.execute(
        select(Answer, shadow)
        .join(shadow, (shadow.correlation == Answer.correlation) & (shadow.choice == Answer.choice))
        .where(~Answer.shadow, shadow.shadow, Answer.messages.is_not(None), ~known)
        .where(Answer.finish == WHOLE, shadow.finish == WHOLE)
        .where(Answer.version != shadow.version, func.trim(Answer.text, BLANKS) != func.trim(shadow.text, BLANKS))
        .order_by(shadow.id)
        .limit(MOST_AT_ONCE)
    ).all()
    new = 0
    for one, beside in found:
        answers = tuple(Written(each.text, each.version, each.seed, each.id) for each in (one, beside))
        new += add(session, "shadow", one.messages, (answers[0], answers[1]), one.sampling)
    return new


def from_evaluations(session: Session, root: Path, params: Params, one: str, other: str) -> tuple[int, int]:
    """Add what two versions answered to the same held-out prompts as they were evaluated.

    Args:
        one, other: number or alias.

    Returns:
        How many pairs are new, and how many prompts both answered.

    Raises:
        UserError: there is no such version, both are the same one, or one keeps no answers.
    """
    versions = [registry.resolve(root, params, name) for name in (one, other)]
    if versions[0].number == versions[1].number:
        raise UserError(f"{one} and {other} are both version {versions[0].number}", remedy="name two versions: `rlhf models` lists them")
    answers = [_evaluated(version, root, params) for version in versions]
    both = [prompt for prompt in answers[0] if prompt in answers[1]]
    new = 0
    for prompt in both:
        first, second = (
            Written(found[prompt], f"{version.model}/{version.number}") for found, version in zip(answers, versions, strict=True)
        )
        new += add(session, "evaluation", json.loads(prompt), (first, second), {"temperature": params.evaluate.temperature})
    return new, len(both)


def _evaluated(version: registry.Version, root: Path, params: Params) -> dict[str, str]:
    """What a version answered as it was evaluated, by prompt."""
    place = registry.model_folder(version.uri, root, params).parent / "evaluation.jsonl"
    if not place.is_file():
        raise UserError(f"version {version.number} keeps no answers of its evaluation", remedy="give another version")
    name = version.tags["algorithm"]
    return {json.dumps(row["prompt"]): row["answers"][name] for row in read_lines(place)}
