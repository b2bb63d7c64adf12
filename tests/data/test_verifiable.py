"""Rows whose answers a program can check: the general layout, each public set's, and what prepare writes of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf.config.data import NamedSource, SandboxSource, VerifiableDataset, VerifiableSource
from rlhf.data.formats import Quarantined, Row, read
from rlhf.data.named import DATASETS
from rlhf.data.prepared import as_prompt
from rlhf.data.sandbox import gold_score
from rlhf.data.verifiable import _FUNCTIONS, boxed
from rlhf.rewards.answers import match
from rlhf.rewards.instructions import CHECKS, follows

NOTHING = {"text": 0, "sft": 0, "reward": 0, "ppo": 0, "judge": 0, "heldout": 0}
GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k-2000.jsonl.gz"
TURNS = [{"role": "user", "content": "What is 1 + 1?"}]
VERL = {
    "data_source": "math_dapo",
    "prompt": TURNS,
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
OF_FUNCTION = {"func_name": "validate_word_constraint", "N": 20, "quantifier": "at most", "language": None}
RLVR = {"messages": TURNS, "ground_truth": "72", "dataset": "gsm8k"}

# format: a row, the reference and the columns that come of it
ROWS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "gsm8k": ({"question": "What is 1 + 1?", "answer": "So <<1+999=1000>>.\n#### 1,000"}, "1000", {"solution": "So <<1+999=1000>>."}),
    "math": (
        {
            "problem": "What is 1 + 1?",
            "level": "Level 5",
            "type": "Algebra",
            "solution": "First \\boxed{1}, then $\\boxed{\\frac{1}{2}}$.",
        },
        "\\frac{1}{2}",
        {"level": "Level 5", "kind": "Algebra"},
    ),
    "dapo-math": (VERL, "34", {"data_source": "math_dapo", "extra_info": {"index": "9a9b6eb4"}, "kind": "MATH"}),
    "verl": (
        VERL | {"reward_model": {"ground_truth": '["1", "\\\\frac{1}{2}"]', "style": "rule"}},
        ["1", "\\frac{1}{2}"],
        {"data_source": "math_dapo", "extra_info": {"index": "9a9b6eb4"}, "kind": "MATH"},
    ),
    "problem-answer": ({"problem": "What is 1 + 1?", "answer": "-\\frac{2}{3}", "solution": "So."}, "-\\frac{2}{3}", {}),
    "big-math": (
        {"problem": "What is 1 + 1?", "answer": "2", "source": "orca_math", "domain": ["Math -> Algebra"], "llama8b_solve_rate": 0.5},
        "2",
        {"source": "orca_math", "domain": ["Math -> Algebra"], "llama8b_solve_rate": 0.5, "kind": "Math -> Algebra"},
    ),
    "openr1-math": (
        {"problem": "What is 1 + 1?", "solution": "So.", "answer": "2", "problem_type": "Algebra", "source": "aops", "generations": ["x"]},
        "2",
        {"source": "aops", "kind": "Algebra"},
    ),
    "deepmath": (
        {"question": "What is 1 + 1?", "final_answer": "2", "difficulty": 4.5, "topic": "Algebra", "r1_solution_1": "x"},
        "2",
        {"difficulty": 4.5, "kind": "Algebra"},
    ),
    "webinstruct-verified": (
        {"id": 1, "question": "What is 1 + 1?", "answer": "2", "answer_type": "Integer", "category": "Mathematics", "difficulty": "x"},
        "2",
        {"answer_type": "Integer", "difficulty": "x", "kind": "Mathematics"},
    ),
    "rlvr": (
        RLVR | {"dataset": "ifeval", "ground_truth": json.dumps(OF_FUNCTION), "constraint_type": "Words", "constraint": "At most 20."},
        {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 20, "relation": "at most"}]},
        {"dataset": "ifeval", "constraint": "At most 20.", "kind": "Words"},
    ),
    "ifeval": (
        {
            "key": 1000,
            "prompt": "What is 1 + 1?",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_words": None, "relation": None}],
        },
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 1000, "kind": "punctuation:no_comma"},
    ),
}


def rows(form: str, records: list[dict[str, Any]], folder: Path, **columns: str) -> list[Row | Quarantined]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    place = {"path": "rows.jsonl", "hub": None, "revision": None, "hub_split": None}
    values = {"name": "sums", "format": form, "split": NOTHING, "weight": 1, **place}
    named = form != "verifiable"
    source = NamedSource.model_validate(values) if named else VerifiableSource.model_validate(values | {"columns": columns})
    return list(read(source, "data.sources.0", folder, 1))


@pytest.mark.parametrize("form", ROWS)
def test_a_row_of_the_dataset(form: str, tmp_path: Path) -> None:
    record, reference, columns = ROWS[form]
    (row,) = rows(form, [record], tmp_path)
    assert isinstance(row, Row), row
    assert (row.kind, row.prompt, row.reference, row.columns) == ("verifiable", tuple(TURNS), reference, columns)
    assert as_prompt(row) == {"prompt": tuple(TURNS), "gold": None, "source": "sums", "reference": reference, "columns": columns}


def test_every_dataset_of_the_schema_has_a_case() -> None:
    assert list(get_args(VerifiableDataset)) == list(ROWS)
    assert set(ROWS) <= set(DATASETS)


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("gsm8k", {"answer": "It is 4."}, "malformed: 'answer' has no ####"),
        ("gsm8k", {"answer": "#### "}, "no answer: there is no reference"),
        ("math", {"solution": "It is 4."}, "no answer: 'solution' has no \\boxed"),
        ("math", {"solution": "\\boxed{4"}, "malformed: the last \\boxed of 'solution' has no end"),
        ("verl", {"reward_model": {"ground_truth": '["1'}}, "malformed: 'reward_model.ground_truth' is no JSON"),
        ("verl", {"reward_model": {}}, "malformed: no 'reward_model.ground_truth'"),
        ("openr1-math", {"answer": None}, "no answer: there is no reference"),
        ("rlvr", {"ground_truth": "{}"}, "malformed: 'ground_truth' names the function None, which is unknown"),
        ("rlvr", {"ground_truth": "x"}, "malformed: 'ground_truth' is no JSON"),
        ("ifeval", {"kwargs": []}, "malformed: 'instruction_id_list' and 'kwargs' are not lists of one length"),
    ],
)
def test_a_bad_row(form: str, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (row,) = rows(form, [ROWS[form][0] | change], tmp_path)
    assert isinstance(row, Quarantined)
    assert row.reason == reason


def test_a_reference_in_braces_is_json_or_a_set(tmp_path: Path) -> None:
    given = [VERL | {"reward_model": {"ground_truth": text}} for text in ('{"a": [1]}', "{1, 2}")]
    assert [row.reference for row in rows("verl", given, tmp_path) if isinstance(row, Row)] == [{"a": [1]}, "{1, 2}"]


def test_a_set_that_repeats_its_rows_is_read_once(tmp_path: Path) -> None:
    other = VERL | {"prompt": [{"role": "user", "content": "And 2 + 2?"}]}
    found = rows("dapo-math", [VERL, other, VERL, VERL], tmp_path)
    assert [row.line for row in found] == [1, 2]


def test_results_of_solutions() -> None:
    assert boxed("\\boxed 5 and $\\boxed{ {1, 2} }$") == "{1, 2}"
    assert boxed("so \\fbox{x} and \\boxed 7$.") == "7"


def test_any_columns_and_any_reference(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"ask": "Hi", "right": {"a": [1, None]}, "kind": "x", "more": 2.5},
        {"ask": [{"role": "user", "content": "Hi"}], "right": False, "kind": "y"},
        {"ask": "Hi", "right": None},
    ]
    first, second, third = rows("verifiable", records, tmp_path, prompt="ask", reference="right")
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (first.reference, first.columns, first.unread) == ({"a": [1, None]}, {"kind": "x", "more": 2.5}, ())
    assert (second.prompt, second.reference, second.columns) == (first.prompt, False, {"kind": "y"})
    assert isinstance(third, Quarantined)
    assert third.reason == "no answer: there is no reference"


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs the GSM8K sample")
def test_gsm8k_as_it_is(tmp_path: Path) -> None:
    with gzip.open(GSM8K, "rt") as file:
        found = rows("gsm8k", [json.loads(line) for line in file], tmp_path)
    assert len(found) == 2000
    assert all(isinstance(row, Row) and float(row.reference) is not None for row in found)


def test_functions_of_open_instruct_have_the_arguments_of_the_instructions() -> None:
    for name, (instruction, arguments, fixed) in _FUNCTIONS.items():
        assert instruction in CHECKS, name
        values = {own: 2 if given in ("N", "i") else ["at"] if own.endswith("words") else "at least" for given, own in arguments.items()}
        values |= {own: ["at"] for own in ("keywords", "options") if own in values}
        follows("It is", instruction, values | fixed)  # it raises where an argument is not one


def test_the_sandbox_gives_the_right_value_as_reference() -> None:
    values = {
        "name": "facts",
        "format": "sandbox",
        "kind": "verifiable",
        "kinds": None,
        "rows": 50,
        "label_noise": 0.0,
        "split": NOTHING,
        "weight": 1,
    }
    found = list(read(SandboxSource.model_validate(values), "data.sources.0", Path(), 1))
    for row in found:
        assert isinstance(row, Row)
        assert row.gold is not None
        assert row.columns == {"kind": row.gold["kind"]}
        assert match(f"It is {row.reference}.", row.reference, "contains") == 1
        assert gold_score(row.gold, f"It is {row.reference}.") >= 0.5
        assert match("I do not know.", row.reference, "contains") == 0
