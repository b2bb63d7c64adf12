"""The embedded data: short dialogues whose best answer is known, made from a seed, with no download.

Ten kinds of small tasks (sandbox_facts.py) are asked in many wordings, some after earlier turns. Answers differ in four ways, which the
gold score adds up to a number between 0 and 1:

    gold = 0.5 · correct + 0.2 · helpful + 0.2 · polite + 0.1 · brief

    correct   the right value is named, and no other value of its kind
    helpful   the right value stands in a full sentence that takes up the question
    polite    a friendly phrase, and no rude one
    brief     1 up to 16 words, then falling to 0 at 32

Demonstrations are of mixed quality, so that there is something for preferences to teach. The gold score labels the pairs (with stated
noise); after that only evaluation reads it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from rlhf.data import sandbox_facts as facts
from rlhf.errors import UserError

WEIGHTS = {"correct": 0.5, "helpful": 0.2, "polite": 0.2, "brief": 0.1}
# Style of an answer → its share among demonstrations.
STYLES = {"curt": 0.3, "plain": 0.25, "polite": 0.15, "polite-curt": 0.05, "rude": 0.1, "rambling": 0.1, "unhelpful": 0.05}
DEMONSTRATIONS_CORRECT = 0.75
NEAR_MISSES = 0.05  # share of wrong answers that are of the right kind
# Shares of pairs: SAME_MANNER right against wrong, which styles alone cannot tell; up to CAREFUL care against carelessness. With 0.3 of the
# first, what the reward model knew of the facts hung on the seed and on rounding (LOG.md).
SAME_MANNER, CAREFUL = 0.6, 0.9
MULTI_TURN = 0.15  # share of prompts with an earlier question and answer before them
MIN_GOLD_GAP = 0.1  # pairs that the gold score can hardly tell apart would only be noise

_VALUES = {kind: sorted(set(task.answers.values())) for kind, task in facts.TASKS.items()}
_VALUE_PATTERNS = {
    kind: re.compile(r"\b(?:" + "|".join(map(re.escape, values)) + r")\b", re.IGNORECASE) for kind, values in _VALUES.items()
}

Gold = dict[str, str]
Message = dict[str, str]


def gold_parts(gold: Gold, answer: str) -> dict[str, float]:
    """The four parts of the gold score, each between 0 and 1.

    Args:
        gold: ``{"kind", "subject", "answer"}`` of the prompt.
        answer: what the assistant said.
    """
    task, right = facts.TASKS[gold["kind"]], gold["answer"].lower()
    text = " ".join(answer.lower().split())
    subject = gold["subject"].lower()
    without_subject = re.sub(rf"\b{re.escape(subject)}\b", " ", text) if subject != right else text
    named = {match.group(0).lower() for match in _VALUE_PATTERNS[gold["kind"]].finditer(without_subject)}
    sentence = task.sentence.format(s=gold["subject"], a=gold["answer"]).lower()
    correct = float(named == {right})
    words = len(text.split())
    return {
        "correct": correct,
        "helpful": correct * float(sentence in text),
        "polite": float(any(p.lower() in text for p in facts.POLITE) and not any(r.lower() in text for r in facts.RUDE)),
        "brief": min(1.0, max(0.0, (32 - words) / 16)) if words else 0.0,
    }


def gold_score(gold: Gold, answer: str) -> float:
    """The gold score of an answer, between 0 and 1."""
    return sum(WEIGHTS[name] * value for name, value in gold_parts(gold, answer).items())


def make_rows(kind: str, rows: int, seed: int, label_noise: float, tasks: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Distinct rows of one kind (text, messages, pairs, prompts or verifiable), the same for the same seed.

    Args:
        label_noise: share of pairs whose chosen and rejected are swapped.
        tasks: kinds of tasks that the rows are of, not for text; None: all.
    """
    makers: dict[str, Callable[[random.Random], dict[str, Any]]] = {
        "text": _passage,
        "messages": _demonstration,
        "prompts": _prompt_row,
        "pairs": partial(_pair, label_noise=label_noise),
        "verifiable": _verifiable_row,
    }
    make = makers[kind]
    rng = random.Random(f"sandbox/{kind}/{seed}")
    distinct: dict[str, dict[str, Any]] = {}
    for _ in range(50 * rows):
        row = make(rng)
        if tasks and row["gold"]["kind"] not in tasks:
            continue
        answers = sorted((row["chosen"], row["rejected"])) if kind == "pairs" else []
        distinct.setdefault(json.dumps([row.get("prompt"), row.get("messages"), row.get("text"), answers]), row)
        if len(distinct) == rows:
            return list(distinct.values())
    raise UserError(
        f"data.sources: the sandbox has only about {len(distinct)} distinct rows of kind {kind}, not {rows}",
        remedy="lower rows of that source",
    )


# ------------------------------------------------------------------------------------------------------------- prompts


def _pick(rng: random.Random) -> Gold:
    kind = rng.choice(list(facts.TASKS))
    subject = rng.choice(list(facts.TASKS[kind].answers))
    return {"kind": kind, "subject": subject, "answer": facts.TASKS[kind].answers[subject]}


def _question(rng: random.Random, gold: Gold) -> str:
    question = rng.choice(facts.TASKS[gold["kind"]].questions).format(s=gold["subject"])
    return rng.choice(facts.QUESTION_OPENINGS) + question + rng.choice(facts.QUESTION_CLOSINGS)


def _prompt(rng: random.Random) -> tuple[list[Message], Gold]:
    gold = _pick(rng)
    messages = []
    if rng.random() < MULTI_TURN:
        earlier = _pick(rng)
        while earlier["kind"] == gold["kind"]:
            earlier = _pick(rng)
        messages = [_user(_question(rng, earlier)), _assistant(_answer(rng, earlier, "plain", correct=True))]
    return [*messages, _user(_question(rng, gold))], gold


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# ------------------------------------------------------------------------------------------------------------- answers


def _answer(rng: random.Random, gold: Gold, style: str, *, correct: bool) -> str:
    value = gold["answer"] if correct else _wrong_value(rng, gold)
    sentence = facts.TASKS[gold["kind"]].sentence.format(s=gold["subject"], a=value)
    curt = f"It is {value}."
    if style == "curt":
        return curt
    if style == "plain":
        return sentence
    if style == "polite":
        return f"{sentence} {rng.choice(facts.POLITE)}"
    if style == "polite-curt":
        return f"{curt} {rng.choice(facts.POLITE)}"
    if style == "rude":
        return f"{rng.choice((sentence, curt))} {rng.choice(facts.RUDE)}"
    if style == "rambling":
        return " ".join([*rng.sample(facts.RAMBLING, 2), sentence])
    return rng.choice(facts.UNHELPFUL)


def _wrong_value(rng: random.Random, gold: Gold) -> str:
    """Mostly something of quite another kind ("The capital of France is green."), sometimes a near miss ("… is Madrid.")."""
    kind = gold["kind"]
    if rng.random() >= NEAR_MISSES:
        kind = rng.choice([other for other in facts.TASKS if other != kind])
    return rng.choice([value for value in _VALUES[kind] if value not in (gold["answer"], gold["subject"])])


def _style(rng: random.Random) -> str:
    return rng.choices(list(STYLES), list(STYLES.values()))[0]


# ---------------------------------------------------------------------------------------------------------------- rows


def _demonstration(rng: random.Random) -> dict[str, Any]:
    prompt, gold = _prompt(rng)
    answer = _answer(rng, gold, _style(rng), correct=rng.random() < DEMONSTRATIONS_CORRECT)
    return {"messages": [*prompt, _assistant(answer)], "gold": gold}


def _prompt_row(rng: random.Random) -> dict[str, Any]:
    prompt, gold = _prompt(rng)
    return {"prompt": prompt, "gold": gold}


def _verifiable_row(rng: random.Random) -> dict[str, Any]:
    """A prompt with its right value, for a reward function; the gold score reads `gold`, which no function gets."""
    row = _prompt_row(rng)
    gold = row["gold"]
    return row | {"prompt": tuple(row["prompt"]), "reference": gold["answer"], "columns": {"kind": gold["kind"]}}


def _pair(rng: random.Random, label_noise: float) -> dict[str, Any]:
    prompt, gold = _prompt(rng)
    while True:
        draw = rng.random()
        if draw < SAME_MANNER:
            style = rng.choice(("curt", "plain", "polite"))
            answers = [_answer(rng, gold, style, correct=True), _answer(rng, gold, style, correct=False)]
        elif draw < CAREFUL:  # somebody who takes care against somebody who does not
            careful = _answer(rng, gold, rng.choice(("plain", "polite", "polite")), correct=rng.random() < 0.9)
            careless = _answer(rng, gold, rng.choice(("curt", "rude", "rambling", "unhelpful")), correct=rng.random() < 0.5)
            answers = [careful, careless]
        else:
            answers = [_answer(rng, gold, _style(rng), correct=rng.random() < 0.6) for _ in range(2)]
        worse, better = sorted(answers, key=lambda answer: gold_score(gold, answer))
        if gold_score(gold, better) - gold_score(gold, worse) >= MIN_GOLD_GAP:
            break
    if rng.random() < label_noise:
        better, worse = worse, better
    return {"prompt": prompt, "chosen": better, "rejected": worse, "gold": gold}


def _passage(rng: random.Random) -> dict[str, Any]:
    sentences = []
    for _ in range(rng.randint(2, 4)):
        gold = _pick(rng)
        draw = rng.random()
        if draw < 0.15:
            sentences.append(
                f"{rng.choice(facts.TIMES)} {rng.choice(facts.NAMES)} went to {rng.choice(facts.PLACES)} and {rng.choice(facts.DEEDS)}."
            )
        elif draw < 0.25:
            sentences.append(_answer(rng, gold, "plain", correct=True))
        else:
            asking, answering = rng.sample(facts.SPEAKERS, 2)
            answer = _answer(rng, gold, rng.choice(("plain", "curt", "polite", "rude")), correct=True)
            sentences.append(f'{asking} asked: "{_question(rng, gold)}" {answering} said: "{answer}"')
    return {"text": " ".join(sentences)}
