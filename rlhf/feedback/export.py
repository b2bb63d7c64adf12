"""Ratings as rows: pairs and demonstrations in the project's formats, what is no pair in a file of its own, and the Arena's columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, joinedload

from rlhf.feedback.tables import WHOLE, Opinion, Pair, Rating
from rlhf.feedback.verdicts import Judged, decided, held, judged
from rlhf.job import write_lines

Row = dict[str, Any]
EXCHANGED = {"first": "second", "second": "first"}
ARENA = {"tie": "tie", "both-bad": "tie (bothbad)", "a": "model_a", "b": "model_b"}


@dataclass
class Exported:
    """Rows, by the name of their file, and what they were made of."""

    rows: dict[str, list[Row]]
    pairs: list[Judged]
    ratings: list[Rating]
    opinions: list[Opinion] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """What was exported, for people."""
        reasons = Counter(row["decision"] for row in self.rows["undecided"])
        more = f" ({', '.join(f'{count} {reason}' for reason, count in sorted(reasons.items()))})" if reasons else ""
        said = {name: f"{name}.jsonl: {len(rows)} rows" for name, rows in self.rows.items()}
        return [*(said | {"undecided": said["undecided"] + more}).values()]


def export(session: Session, least: int = 1, *, new: bool = False) -> Exported:
    """All that was rated, and what applications said.

    Args:
        least: ratings that a pair must have.
        new: only what is no data yet.
    """
    ratings = held(session, lock=new)
    complete = [pair for pair in judged(ratings) if len(pair.ratings) >= least]
    pairs = [pair for pair in complete if not (new and _is_data(pair))]
    edited = [rating for rating in ratings if _corrects(rating) and not (new and rating.is_data)]
    opinions = _opinions(session, new=new)
    rows: dict[str, list[Row]] = {"pairs": [], "demonstrations": [], "undecided": [], "thumbs": [], "arena": []}
    for same in _alike(complete):
        if not (new and all(map(_is_data, same))):
            _decide(same, rows, new=new)
    for rating in edited:
        _correct(rating.pair.prompt, _chosen(rating), rating.edit or "", rows)
    for opinion in _last(opinions):
        if opinion.edit:
            _correct(_prompt(opinion), opinion.answer.text, opinion.edit, rows)
        elif opinion.thumb and (opinion.thumb < 0 or opinion.answer.finish == WHOLE):  # what was cut off is no example
            rows["thumbs"].append({"prompt": _prompt(opinion), "completion": opinion.answer.text, "label": opinion.thumb > 0})
    rows["arena"] = [_arena(rating) for pair in pairs for rating in pair.ratings]
    all_of_them = [*(rating for pair in pairs for rating in pair.ratings), *edited]
    taken = {rating.id: rating for rating in all_of_them if not (new and rating.is_data)}
    return Exported(rows, pairs, list(taken.values()), opinions)


def write(exported: Exported, folder: Path) -> None:
    """Write each kind of row into a file of JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in exported.rows.items():
        write_lines(folder / f"{name}.jsonl", rows)


def _corrects(rating: Rating) -> bool:
    return bool(rating.edit) and rating.choice in ("a", "b") and rating.pair.gold is None


def _is_data(pair: Judged) -> bool:
    return all(rating.is_data for rating in pair.ratings)


def _opinions(session: Session, *, new: bool) -> list[Opinion]:
    query = select(Opinion).options(joinedload(Opinion.answer)).order_by(Opinion.id)
    return list(session.scalars(query.where(Opinion.ingested.is_(None)) if new else query))


def _last(opinions: Iterable[Opinion]) -> list[Opinion]:
    """Of what was said of an answer the last edit, else the last thumb; what a user was told twice, word for word, is one answer."""
    found: dict[str, Opinion] = {}
    for opinion in opinions:
        same = json.dumps([opinion.answer.user or opinion.answer_id, _prompt(opinion), opinion.answer.text])
        before = found.get(same)
        if opinion.edit or (opinion.thumb and not (before and before.edit)):
            found[same] = opinion
    return list(found.values())


def _prompt(opinion: Opinion) -> list[dict[str, str]]:
    return opinion.answer.messages or [{"role": "user", "content": opinion.answer.prompt or ""}]


def _alike(pairs: Iterable[Judged]) -> list[list[Judged]]:
    """Pairs by what they say: the same two answers to the same prompt may have been brought several times."""
    found: dict[str, list[Judged]] = {}
    for judgement in pairs:
        pair = judgement.pair
        found.setdefault(json.dumps([pair.prompt, sorted([pair.first_text, pair.second_text])]), []).append(judgement)
    return list(found.values())


def _decide(same: Sequence[Judged], rows: dict[str, list[Row]], *, new: bool) -> None:
    """One row of pairs that say the same: a preference, or none."""
    pair = same[0].pair
    ratings = sorted((rating for judgement in same for rating in judgement.ratings), key=lambda rating: rating.id)
    votes, before = _votes(pair, ratings), _votes(pair, [rating for rating in ratings if new and rating.is_data])
    verdict, share = decided(votes)
    if before and EXCHANGED.get(verdict) == decided(before)[0]:
        verdict = "contrary to data"  # which holds the other row, and would hold both
    beside = {"ratings": votes.total(), "versions": [pair.first_version, pair.second_version], "seeds": [pair.first_seed, pair.second_seed]}
    answers = [pair.first_text, pair.second_text]
    if verdict in ("first", "second"):
        chosen, rejected = answers if verdict == "first" else answers[::-1]
        rows["pairs"].append({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected, "confidence": share} | beside)
    else:
        rows["undecided"].append({"prompt": pair.prompt, "answers": answers, "decision": verdict, "votes": dict(votes)} | beside)


def _votes(pair: Pair, ratings: Iterable[Rating]) -> Counter[str]:
    """Each rater's last verdict, by the sides of a pair with the same answers."""
    last: dict[str, str] = {}
    for rating in ratings:
        alike = rating.pair.first_text == pair.first_text
        last[rating.rater] = rating.verdict if alike else EXCHANGED.get(rating.verdict, rating.verdict)
    return Counter(last.values())


def _chosen(rating: Rating) -> str:
    return rating.pair.first_text if rating.verdict == "first" else rating.pair.second_text


def _correct(prompt: list[dict[str, str]], answer: str, edit: str, rows: dict[str, list[Row]]) -> None:
    """An answer that was edited: as it should be it is a demonstration, and better than it was."""
    rows["demonstrations"].append({"messages": [*prompt, {"role": "assistant", "content": edit}]})
    if edit.strip() != answer.strip():
        rows["pairs"].append({"prompt": prompt, "chosen": edit, "rejected": answer, "confidence": 1.0, "ratings": 1})


def _arena(rating: Rating) -> Row:
    """A rating as the Arena logs it: model_a is what stood on the left."""
    pair = rating.pair
    sides = [(pair.first_version, pair.first_text), (pair.second_version, pair.second_text)]
    (model_a, text_a), (model_b, text_b) = sides[::-1] if rating.swapped else sides
    return {
        "question_id": pair.name,
        "model_a": model_a,
        "model_b": model_b,
        "winner": ARENA[rating.choice],
        "judge": rating.rater,
        "conversation_a": [*pair.prompt, {"role": "assistant", "content": text_a}],
        "conversation_b": [*pair.prompt, {"role": "assistant", "content": text_b}],
        "turn": sum(turn["role"] == "user" for turn in pair.prompt),
        "anony": True,
        "language": "unknown",
        "tstamp": rating.at.timestamp(),
    }
