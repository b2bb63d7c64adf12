"""Rows whose answers a program can check: the general layout, and those of public sets for reinforcement learning, by their own columns.

Each has a prompt, a reference (what is right: any JSON value) and further columns, which reward functions get. The column `kind` is what
accuracy is also reported by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from rlhf.data.fields import BadRow, Fields, Record, Records, string, value_at
from rlhf.data.turns import asks, turns, turns_or_question

Path = tuple[str | int, ...]


def made(prompt: Any, reference: Any, columns: dict[str, Any]) -> Fields:
    """The fields of a row.

    Raises:
        BadRow: there is no reference.
    """
    if reference is None or reference == "":
        raise BadRow("no answer: there is no reference")
    return {"prompt": prompt, "reference": _as_json(reference), "columns": _as_json(columns)}


def _as_json(value: Any) -> Any:
    """Columns of tables hold dates, bytes and the like, which become text."""
    return json.loads(json.dumps(value, default=str))


def general(record: Record, prompt: str, reference: str) -> Fields:
    """A row of format verifiable: all its other columns are kept."""
    rest = {name: value for name, value in record.items() if name not in (prompt, reference)}
    return made(turns_or_question(record, prompt), record[reference], rest)


def question(prompt: Path, reference: Path, kept: tuple[str, ...] = (), kind: Path | None = None) -> Callable[[Record], Fields]:
    """A reader of a question and its answer, each at a path of its own.

    Args:
        kept: columns that reward functions get.
        kind: where the kind of the task stands, if anywhere.
    """

    def parse(record: Record) -> Fields:
        said = value_at(record, *prompt)
        asked = turns(record, str(prompt[0])) if isinstance(said, list) else asks(string(record, *prompt))
        return made(asked, value_at(record, *reference), columns(record, kept, kind))

    return parse


def columns(record: Record, kept: tuple[str, ...], kind: Path | None = None) -> dict[str, Any]:
    found = {name: record[name] for name in kept if record.get(name) is not None}
    try:
        return found | ({"kind": str(value_at(record, *kind))} if kind else {})
    except BadRow:  # some rows have none
        return found


# ---------------------------------------------------------------------------------------------------------- mathematics


def gsm8k(record: Record) -> Fields:
    """The result stands behind ####, with commas between thousands."""
    solution, mark, result = string(record, "answer").rpartition("####")
    if not mark:
        raise BadRow("malformed: 'answer' has no ####")
    return made(asks(string(record, "question")), result.strip().replace(",", ""), {"solution": solution.strip()})


def competition_math(record: Record) -> Fields:
    r"""The result is the last \boxed of the solution, or stands in a column of its own (MATH-500)."""
    given = record.get("answer")
    result = given if isinstance(given, str) else boxed(string(record, "solution"))
    kind = ("type",) if "type" in record else ("subject",)
    return made(asks(string(record, "problem")), result, columns(record, ("level",), kind))


def boxed(text: str) -> str:
    r"""What the last \boxed or \fbox of a text holds.

    Raises:
        BadRow: there is none, or it has no end.
    """
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{$]+))", text))
    if not found:
        raise BadRow("no answer: 'solution' has no \\boxed")
    if found[-1][1]:  # \boxed 5
        return found[-1][1]
    depth = 1
    for place in range(found[-1].end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[found[-1].end() : place].strip()
    raise BadRow("malformed: the last \\boxed of 'solution' has no end")


def of_verl(record: Record) -> Fields:
    """The layout of verl: a list of turns, and the reference in reward_model.ground_truth, which may be JSON in a text."""
    reference = value_at(record, "reward_model", "ground_truth")
    if isinstance(reference, str) and reference.startswith(('["', "[[")):
        reference = parsed(reference, "reward_model.ground_truth")
    elif isinstance(reference, str) and reference.startswith("{"):
        with suppress(BadRow):  # a set, in LaTeX
            reference = parsed(reference, "reward_model.ground_truth")
    return made(turns(record, "prompt"), reference, columns(record, ("data_source", "extra_info"), ("ability",)))


def once(records: Records) -> Records:
    """Each prompt once: DAPO-Math-17k holds every row a hundred times."""
    seen: set[str] = set()
    for line, record in records:
        asked = json.dumps(record.get("prompt"), default=str) if isinstance(record, dict) else str(line)
        if asked not in seen:
            seen.add(asked)
            yield line, record


def parsed(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"malformed: '{column}' is no JSON") from None


# --------------------------------------------------------------------------------------------------------- instructions


def ifeval(record: Record) -> Fields:
    names, arguments = value_at(record, "instruction_id_list"), value_at(record, "kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments) or not names:
        raise BadRow("malformed: 'instruction_id_list' and 'kwargs' are not lists of one length")
    without = [{key: value for key, value in (given or {}).items() if value is not None} for given in arguments]
    reference = {"instruction_id_list": names, "kwargs": without}
    return made(asks(string(record, "prompt")), reference, columns(record, ("key",)) | {"kind": str(names[0])})


def rlvr(record: Record) -> Fields:
    """A list of turns and a reference as text; that of an instruction names a function of open-instruct and its arguments."""
    reference: Any = string(record, "ground_truth")
    kind: Path = ("dataset",)
    if record.get("dataset") == "ifeval":
        reference, kind = of_function(parsed(reference, "ground_truth")), ("constraint_type",)
    return made(turns(record, "messages"), reference, columns(record, ("dataset", "constraint"), kind))


# function of open-instruct: IFEval's name of the instruction, and of its arguments
_EXACTLY = {"relation": "exactly"}
_FUNCTIONS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "verify_keywords": ("keywords:existence", {"keyword_list": "keywords"}, {}),
    "verify_keyword_frequency": ("keywords:frequency", {"word": "keyword", "N": "frequency"}, _EXACTLY),
    "validate_forbidden_words": ("keywords:forbidden_words", {"forbidden_words": "forbidden_words"}, {}),
    "verify_letter_frequency": ("keywords:letter_frequency", {"letter": "letter", "N": "let_frequency"}, {"let_relation": "exactly"}),
    "validate_response_language": ("language:response_language", {"language": "language"}, {}),
    "verify_paragraph_count": ("length_constraints:number_paragraphs", {"N": "num_paragraphs"}, {}),
    "validate_word_constraint": ("length_constraints:number_words", {"N": "num_words", "quantifier": "relation"}, {}),
    "verify_sentence_constraint": ("length_constraints:number_sentences", {"N": "num_sentences", "quantifier": "relation"}, {}),
    "validate_paragraphs": (
        "length_constraints:nth_paragraph_first_word",
        {"N": "num_paragraphs", "first_word": "first_word", "i": "nth_paragraph"},
        {},
    ),
    "verify_postscript": ("detectable_content:postscript", {"postscript_marker": "postscript_marker"}, {}),
    "validate_placeholders": ("detectable_content:number_placeholders", {"N": "num_placeholders"}, {}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"N": "num_bullets"}, {}),
    "validate_title": ("detectable_format:title", {}, {}),
    "validate_choice": ("detectable_format:constrained_response", {"options": "options"}, {}),
    "validate_highlighted_sections": ("detectable_format:number_highlighted_sections", {"N": "num_highlights"}, {}),
    "validate_sections": ("detectable_format:multiple_sections", {"N": "num_sections", "section_splitter": "section_spliter"}, {}),
    "validate_json_format": ("detectable_format:json_format", {}, {}),
    "validate_repeat_prompt": ("combination:repeat_prompt", {"original_prompt": "prompt_to_repeat"}, {}),
    "validate_two_responses": ("combination:two_responses", {}, {}),
    "validate_uppercase": ("change_case:english_capital", {}, {}),
    "validate_lowercase": ("change_case:english_lowercase", {}, {}),
    "validate_frequency_capital_words": (
        "change_case:capital_word_frequency",
        {"N": "capital_frequency", "quantifier": "capital_relation"},
        {},
    ),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}, {}),
    "validate_quotation": ("startend:quotation", {}, {}),
    "validate_no_commas": ("punctuation:no_comma", {}, {}),
}


def of_function(asked: Any) -> dict[str, Any]:
    """A function of open-instruct with its arguments, as IFEval names them.

    Raises:
        BadRow: it is an unknown one.
    """
    name = asked.get("func_name") if isinstance(asked, dict) else None
    if name not in _FUNCTIONS:
        raise BadRow(f"malformed: 'ground_truth' names the function {name!r}, which is unknown")
    instruction, names, fixed = _FUNCTIONS[name]
    arguments = {own: asked[given] for given, own in names.items() if asked.get(given) is not None}
    if isinstance(arguments.get("options"), str):
        arguments["options"] = re.split(r"\s*/\s*|\s*,\s*", arguments["options"].strip("[]() "))
    return {"instruction_id_list": [instruction], "kwargs": [arguments | fixed]}


# ---------------------------------------------------------------------------------------------------------------- table


def layouts() -> Iterator[tuple[str, str, tuple[str, ...], Callable[[Record], Fields], Callable[[Records], Records] | None]]:
    """Name, where it is found, the columns that every row must have, and how its rows are read."""
    yield "gsm8k", "openai/gsm8k", ("question", "answer"), gsm8k, None
    yield "math", "DigitalLearningGmbH/MATH-lighteval, HuggingFaceH4/MATH-500", ("problem", "solution"), competition_math, None
    yield "dapo-math", "BytedTsinghua-SIA/DAPO-Math-17k", ("prompt", "reward_model"), of_verl, once
    yield "verl", "any set in the layout of verl, for example Skywork/Skywork-OR1-RL-Data", ("prompt", "reward_model"), of_verl, None
    yield (
        "problem-answer",
        "agentica-org/DeepScaleR-Preview-Dataset, HuggingFaceH4/aime_2024",
        ("problem", "answer"),
        question(("problem",), ("answer",)),
        None,
    )
    big = question(("problem",), ("answer",), ("source", "domain", "llama8b_solve_rate"), ("domain", 0))
    yield "big-math", "SynthLabsAI/Big-Math-RL-Verified", ("problem", "answer"), big, None
    open_r1 = question(("problem",), ("answer",), ("source", "question_type", "uuid"), ("problem_type",))
    yield "openr1-math", "open-r1/OpenR1-Math-220k, AI-MO/NuminaMath-1.5", ("problem", "answer"), open_r1, None
    deep = question(("question",), ("final_answer",), ("difficulty",), ("topic",))
    yield "deepmath", "zwhe99/DeepMath-103K", ("question", "final_answer"), deep, None
    webinstruct = question(("question",), ("answer",), ("answer_type", "difficulty"), ("category",))
    yield "webinstruct-verified", "TIGER-Lab/WebInstruct-verified", ("question", "answer"), webinstruct, None
    mixed = "allenai/RLVR-GSM, allenai/RLVR-MATH, allenai/RLVR-IFeval, allenai/RLVR-GSM-MATH-IF-Mixed-Constraints"
    yield "rlvr", mixed, ("messages", "ground_truth", "dataset"), rlvr, None
    yield "ifeval", "google/IFEval", ("prompt", "instruction_id_list", "kwargs"), ifeval, None
