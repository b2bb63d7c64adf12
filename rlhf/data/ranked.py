"""Public datasets that rate several answers to a prompt, or each answer by itself, as pairs and demonstrations by a rule for each.

Of several answers, the best and the worst make the pair: two that differ clearly, and one pair for each prompt, so that none counts more
often than another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf.data.fields import BadRow, Fields, Record, Records, Turns, Unreadable, number, string, value_at
from rlhf.data.turns import answered, asks, keyed_turns, last_answer, marked_turns, plain, turns_or_question


def nectar(record: Record) -> Fields:
    """Answers with a rank each: the one ranked first against the one ranked last."""
    dialogue = marked_turns(string(record, "prompt"), "prompt")
    if dialogue and dialogue[-1] == {"role": "assistant", "content": ""}:
        dialogue = dialogue[:-1]
    return _best_and_worst(record, "answers", dialogue, lambda answer: (-number(answer, "rank"),), "answer")


def ultrafeedback(record: Record) -> Fields:
    """Four answers: the highest mean of the ratings of four aspects against the lowest (overall_score has known slips: 10 for a 1)."""
    prompt = asks(string(record, "instruction"))
    return _best_and_worst(record, "completions", prompt, lambda answer: (number(answer, "fine-grained_score"),), "response")


HELPSTEER_RANK = ("helpfulness", "correctness", "coherence")


def helpsteer(record: Record) -> Fields:
    """Answers to one prompt, gathered: the most helpful against the least; where they are equal, by correctness, then coherence."""
    prompt = _helpsteer_turns(string(record, "prompt"))
    return _best_and_worst(record, "answers", prompt, lambda answer: tuple(number(answer, name) for name in HELPSTEER_RANK), "response")


def same_prompt(records: Records) -> Records:
    """Records that follow each other with the same prompt as one, under the line of the first: they become its `answers`."""
    group: list[Any] = []
    first = 0
    for line, record in records:
        follows = group and not isinstance(record, Unreadable) and "prompt" in record and record["prompt"] == group[0]["prompt"]
        if group and not follows:
            yield first, {**group[0], "answers": group}
            group = []
        if isinstance(record, Unreadable) or "prompt" not in record:
            yield line, record
            continue
        first = first if group else line
        group.append(record)
    if group:
        yield first, {**group[0], "answers": group}


def helpsteer_preference(prompt: str, first: str, second: str, preference: str) -> Callable[[Record], Fields]:
    """A reader of two answers and a preference from -3 (the first is much better) to 3 (the second is); 0 is a tie."""

    def parse(record: Record) -> Fields:
        given = record[prompt]
        dialogue = keyed_turns(given, prompt) if isinstance(given, list) else _helpsteer_turns(string(record, prompt))
        better = number(record, preference)
        if better == 0:
            raise BadRow(f"tie: '{preference}' is 0")
        answers = [string(record, name).strip() for name in ((first, second) if better < 0 else (second, first))]
        return {"prompt": dialogue, "chosen": answers[0], "rejected": answers[1]}

    return parse


def _helpsteer_turns(prompt: str) -> Turns:
    """The user's text, or turns with a marker before each but the first."""
    question, *parts = re.split(r"\s*<extra_id_1>(User|Assistant)\n", prompt)
    later = zip(parts[::2], parts[1::2], strict=True)
    return (*asks(question), *({"role": name.lower(), "content": content.strip()} for name, content in later))


def openai_preference(record: Record) -> Fields:
    """OpenAI's form of a pair: the messages before, and two answers, each a list of one turn."""
    before = keyed_turns(value_at(record, "input", "messages"), "input.messages")
    answers = []
    for side in ("preferred_output", "non_preferred_output"):
        earlier, answer = last_answer(keyed_turns(record[side], side), side)
        if earlier:
            raise BadRow(f"malformed: '{side}' has more turns than the answer")
        answers.append(plain(answer, side))
    tools = record["input"].get("tools")
    return {"prompt": before, "chosen": answers[0], "rejected": answers[1], **({"tools": tools} if tools else {})}


def unpaired(record: Record) -> Fields:
    """KTO's form: an answer and whether it is desirable. A demonstration if it is: nothing here learns from a lone bad one."""
    label = record["label"]
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise BadRow(f"malformed: 'label' is {label!r}, not true or false")
    if not label:
        raise BadRow("undesirable: 'label' is false, and no stage learns from an answer that is only bad")
    prompt, answer = turns_or_question(record, "prompt"), record["completion"]
    if not isinstance(answer, list):
        return {"prompt": prompt, "chosen": string(record, "completion").strip()}
    before, last = last_answer(keyed_turns(answer, "completion"), "completion")
    if before not in ((), prompt):
        raise BadRow("malformed: 'completion' is a dialogue that does not begin with the prompt")
    return {"prompt": prompt, **answered(last)}


def _best_and_worst(record: Record, column: str, prompt: Turns, rank: Callable[[Record], tuple[float, ...]], text: str) -> Fields:
    """The pair of the highest and the lowest rank; of equal ones the first."""
    answers = record[column]
    if not (isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers)):
        raise BadRow(f"malformed: '{column}' is not a list of objects")
    if len(answers) < 2:
        raise BadRow(f"no pair: {len(answers)} answer to this prompt")
    ranks = list(_ranks(answers, rank))
    if max(ranks) == min(ranks):
        raise BadRow(f"tie: all {len(answers)} answers have the same rank")
    best, worst = (string(answers[ranks.index(end)], text).strip() for end in (max(ranks), min(ranks)))
    return {"prompt": prompt, "chosen": best, "rejected": worst}


def _ranks(answers: Sequence[Record], rank: Callable[[Record], tuple[float, ...]]) -> Iterator[tuple[float, ...]]:
    for answer in answers:
        try:
            yield rank(answer)
        except KeyError as name:
            raise BadRow(f"malformed: an answer has no {name}") from None
