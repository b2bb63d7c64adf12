"""Readers of public datasets by their own columns: those of DeepSpeed-Chat and the forms that instruction data comes in.

Each is a function from a record to the fields of a row; the table at the end names them. Rows that a dataset holds by design, but that
teach nothing, have the reasons "tie" (no preference) and "no answer".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.data import ranked, verifiable
from rlhf.data.fields import BadRow, Fields, Record, Records, Turn, Turns, name_of, number, string, value_at
from rlhf.data.turns import asks, demonstration, keyed_turns, marked_turns

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Dataset:
    """How the rows of a public dataset are read."""

    hub: str  # where it is found
    columns: tuple[str, ...]  # what every row must have
    parse: Callable[[Record], Fields]
    gather: Callable[[Records], Records] | None = None  # where a row is made of several records


# ----------------------------------------------------------------------------------------------------------------- pairs


def plain_pair(record: Record) -> Fields:
    return _pair(asks(string(record, "prompt")), string(record, "chosen"), string(record, "rejected"))


def marked_pair(record: Record) -> Fields:
    """The prompt is a dialogue with ``Human:`` and ``Assistant:``; it, or each answer, ends or begins with a bare ``Assistant:``."""
    dialogue = marked_turns(string(record, "prompt"), "prompt")
    if dialogue and dialogue[-1] == {"role": "assistant", "content": ""}:
        dialogue = dialogue[:-1]
    answers = [re.sub(r"^Assistant[:：]", "", string(record, side).strip()) for side in ("chosen", "rejected")]
    return _pair(dialogue, *answers)


def webgpt(record: Record) -> Fields:
    """Scores from −1 to 1 that sum to 0; 0 is no preference."""
    question = asks(string(record, "question", "full_text"))
    better = _better(record, "score_0", "score_1")
    return _pair(question, *(string(record, f"answer_{i}") for i in (better, 1 - better)))


def shp(record: Record) -> Fields:
    """Two comments on a post: label 1 prefers A, 0 prefers B."""
    if record["labels"] not in (0, 1):
        raise BadRow(f"malformed: 'labels' is {record['labels']!r}, not 0 or 1")
    _better(record, "score_A", "score_B")
    better, worse = "AB" if record["labels"] else "BA"
    return _pair(asks(string(record, "history")), string(record, f"human_ref_{better}"), string(record, f"human_ref_{worse}"))


def miracl(record: Record) -> Fields:
    """A query, and passages that answer it or do not: the first of each."""
    passages = [_answer(record, column, 0, "text") for column in ("positive_passages", "negative_passages")]
    return _pair(asks(string(record, "query")), *passages)


def _pair(prompt: Turns, chosen: str, rejected: str) -> Fields:
    return {"prompt": prompt, "chosen": chosen.strip(), "rejected": rejected.strip()}


def _better(record: Record, first: str, second: str) -> int:
    """Which of two scores is higher, 0 or 1."""
    scores = number(record, first), number(record, second)
    if scores[0] == scores[1]:
        raise BadRow(f"tie: '{first}' equals '{second}'")
    return int(scores[1] > scores[0])


# --------------------------------------------------------------------------------------------------------- demonstrations


def question_answer(question: Path, answer: Path) -> Callable[[Record], Fields]:
    """A reader of one question and its answer, each at a path of its own."""

    def parse(record: Record) -> Fields:
        return {"prompt": asks(string(record, *question)), "chosen": _answer(record, *answer)}

    return parse


def alpaca(record: Record) -> Fields:
    """An instruction, what it is applied to (may be empty), and the output; `history` holds earlier ones, each with its answer."""
    given = string(record, "input") if record.get("input") is not None else ""
    last = asks(f"{string(record, 'instruction')}\n\n{given}".strip())
    return {"prompt": (*_history(record.get("history") or []), *last), "chosen": _answer(record, "output")}


def _history(rounds: Any) -> Iterator[Turn]:
    for said in rounds if isinstance(rounds, list) else [rounds]:
        if not (isinstance(said, list) and len(said) == 2 and all(isinstance(text, str) for text in said)):
            raise BadRow("malformed: 'history' is not a list of pairs of texts")
        yield from ({"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True))


def sharegpt(record: Record) -> Fields:
    """Turns ``{from, value}``."""
    return demonstration(keyed_turns(record["conversations"], "conversations", "from", "value"), "conversations")


def vicuna(record: Record) -> Fields:
    """A text with ``USER:`` and ``ASSISTANT:`` that ends where the label goes on; what stands before the first is the system turn."""
    system, *parts = re.split(r"(?:^|\s)(USER|ASSISTANT)[:：]", string(record, "prompt"))
    said = zip(parts[::2], parts[1::2], strict=True)
    turns = [{"role": role.lower(), "content": content.strip().removesuffix("</s>").strip()} for role, content in said]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    before = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return {"prompt": (*before, *turns), "chosen": _answer(record, "label").removesuffix("</s>").strip()}


def oasst(record: Record) -> Fields:
    """A tree of messages, each with its replies: from the root along the best-ranked reply to the last answer."""
    turns: list[Turn] = []
    replies: list[Any] = [record["prompt"]]
    while replies:
        best = min(replies, key=_rank)
        turns += keyed_turns([best], "prompt", "role", "text")
        replies = best.get("replies") or []
    while turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise BadRow("no answer: 'prompt' has no replies")
    return demonstration(tuple(turns), "prompt")


def _rank(message: Any) -> float:
    rank = message.get("rank") if isinstance(message, dict) else None
    return rank if isinstance(rank, int) else float("inf")


def _answer(record: Record, *path: str | int) -> str:
    """The text at a path; null, or an empty list on the way, is a question that the dataset leaves unanswered."""
    for depth in range(1, len(path) + 1):
        value = value_at(record, *path[:depth])
        if value is None or value == []:
            raise BadRow(f"no answer: '{name_of(path[:depth])}' is {'null' if value is None else 'empty'}")
    return string(record, *path).strip()


# ----------------------------------------------------------------------------------------------------------------- table

_PAIR = ("prompt", "chosen", "rejected")

DATASETS: dict[str, Dataset] = {
    "rm-static": Dataset("Dahoas/rm-static", _PAIR, marked_pair),
    "full-hh-rlhf": Dataset("Dahoas/full-hh-rlhf", _PAIR, marked_pair),
    "synthetic-instruct-gptj-pairwise": Dataset("Dahoas/synthetic-instruct-gptj-pairwise", _PAIR, plain_pair),
    "rlhf-reward-datasets": Dataset("yitingxie/rlhf-reward-datasets", _PAIR, marked_pair),
    "webgpt": Dataset("openai/webgpt_comparisons", ("question", "answer_0", "answer_1", "score_0", "score_1"), webgpt),
    "shp": Dataset("stanfordnlp/SHP", ("history", "human_ref_A", "human_ref_B", "score_A", "score_B", "labels"), shp),
    "miracl": Dataset(
        "Cohere/miracl-zh-queries-22-12, Cohere/miracl-ja-queries-22-12", ("query", "positive_passages", "negative_passages"), miracl
    ),
    "nectar": Dataset("berkeley-nest/Nectar", ("prompt", "answers"), ranked.nectar),
    "ultrafeedback": Dataset("openbmb/UltraFeedback", ("instruction", "completions"), ranked.ultrafeedback),
    "helpsteer": Dataset(
        "nvidia/HelpSteer, nvidia/HelpSteer2", ("prompt", "response", *ranked.HELPSTEER_RANK), ranked.helpsteer, ranked.same_prompt
    ),
    "helpsteer2-preference": Dataset(
        "nvidia/HelpSteer2 (its folder preference)",
        ("prompt", "response_1", "response_2", "preference_strength"),
        ranked.helpsteer_preference("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "helpsteer3": Dataset(
        "nvidia/HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        ranked.helpsteer_preference("context", "response1", "response2", "overall_preference"),
    ),
    "openai-preference": Dataset(
        "OpenAI's files for preference tuning", ("input", "preferred_output", "non_preferred_output"), ranked.openai_preference
    ),
    "kto": Dataset("trl-lib/kto-mix-14k", ("prompt", "completion", "label"), ranked.unpaired),
    "alpaca": Dataset("tatsu-lab/alpaca", ("instruction", "output"), alpaca),
    "sharegpt": Dataset("anon8231489123/ShareGPT_Vicuna_unfiltered", ("conversations",), sharegpt),
    "vicuna": Dataset("pvduy/sharegpt_alpaca_oa_vicuna_format", ("prompt", "label"), vicuna),
    "oasst": Dataset("OpenAssistant/oasst1 (its files of trees)", ("prompt",), oasst),
    "zhihu-kol": Dataset("wangrui6/Zhihu-KOL", ("INSTRUCTION", "RESPONSE"), question_answer(("INSTRUCTION",), ("RESPONSE",))),
    "hc3": Dataset("Hello-SimpleAI/HC3-Chinese", ("question", "human_answers"), question_answer(("question",), ("human_answers", 0))),
    "mkqa-zh": Dataset("apple/mkqa", ("queries", "answers"), question_answer(("queries", "zh_cn"), ("answers", "zh_cn", 0, "text"))),
    "mkqa-ja": Dataset("apple/mkqa", ("queries", "answers"), question_answer(("queries", "ja"), ("answers", "ja", 0, "text"))),
    "qg-jaquad": Dataset("lmqg/qg_jaquad", ("question", "sentence"), question_answer(("question",), ("sentence",))),
    "qag-jaquad": Dataset("lmqg/qag_jaquad", ("questions", "paragraph"), question_answer(("questions", 0), ("paragraph",))),
}
DATASETS |= {name: Dataset(hub, columns, parse, gather) for name, hub, columns, parse, gather in verifiable.layouts()}
