"""Built-in reward functions, by answers worked out by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.rewards import BUILT_IN
from rlhf.rewards import answers, functions, penalties
from rlhf.rewards.instructions import CHECKS, follows, instructions

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k-2000.jsonl.gz"


def test_the_schema_names_the_built_in_functions() -> None:
    assert list(BUILT_IN) == sorted(functions.BUILT_IN)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("So it is \\boxed{0.5}.", "\\frac{1}{2}", 1),
        ("So it is $\\frac{2}{4}$.", "0.5", 1),
        ("The answer is 72.", 72, 1),
        ("The answer is 73.", 72, 0),
        ("#### 2,317", "2317", 1),
        ("It is 3, no: \\boxed{4}", "4", 1),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", 1),
        ("\\boxed{(1,2)}", "(1,2)", 1),
        ("\\boxed{(2,1)}", "(1,2)", 0),
        ("I do not know.", "4", 0),
        ("7", ["6", "7"], 1),
        ("\\boxed{5\\sqrt{3}}", "5\\sqrt{3}", 1),
        ("\\boxed{5}", "5\\sqrt{3}", 0),
        ("\\boxed{3+4i}", "3 + 4i", 1),
        ("\\boxed{4}", "3 + 4i", 0),
        ("\\boxed{\\frac{3}{2}}", "1 \\frac{1}{2}", 1),
        ("$(-\\infty, 2)\\cup(3,\\infty)$", "(-\\infty, 2)\\cup(3,\\infty)", 1),
        ("\\boxed{2, -1}", "-1, 2", 1),
        ("It is 10\\%, so \\boxed{10\\%}", "10\\%", 1),
        ("\\boxed{2x + 3}", "y = 2x + 3", 1),
        ("1500", "1.5e3", 1),
        ("\\boxed{12.5}", "$12.50", 1),
        ("$\\frac12$", "\\(\\frac{1}{2}\\)", 1),
    ],
)
def test_math(answer: str, reference: Any, right: float) -> None:
    assert answers.math(answer, reference) == right


def test_a_reference_that_is_no_mathematics_is_told() -> None:
    with pytest.raises(ValueError, match="reference is None"):
        answers.math("1", None)
    with pytest.raises(ValueError, match="no mathematical value"):
        answers.math("1", "")


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs the GSM8K sample")
def test_math_on_real_answers() -> None:
    with gzip.open(GSM8K, "rt") as file:
        rows = [json.loads(line) for line in file][:200]
    rights = [row["answer"].rpartition("####")[2].strip() for row in rows]
    assert sum(answers.math(f"So the result is {right}.", right) for right in rights) == 200
    assert sum(answers.math(f"The answer is 7{right}", right) for right in rights) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "how", "right"),
    [
        (" Paris ", "Paris", "exact", 1),
        ("paris", "Paris", "exact", 0),
        ("The  Paris!", "paris", "normalised", 1),
        ("Paris, France", "paris", "normalised", 0),
        ("-5", "5", "normalised", 0),
        ("−5.", "-5", "normalised", 1),
        ("It is 12.5.", "5", "contains", 0),
        ("It is 12.5.", "12.5", "contains", 1),
        ("1,000 (about)", "1000", "contains", 1),
        ("10-5", "5", "contains", 1),
        ("well-known", "well known", "normalised", 1),
        ("The capital of France is Paris.", "Paris", "contains", 1),
        ("The Parisian one.", "Paris", "contains", 0),
        ("It is a new york minute", ["London", "New York"], "contains", 1),
    ],
)
def test_match(answer: str, reference: Any, how: Any, right: float) -> None:
    assert answers.match(answer, reference, how) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C) since it is so", "C"),
        ("The answer is (D).", "D"),
        ("Answer: **A**", "A"),
        ("A is wrong, so \\boxed{B}", "B"),
        ("Because of that, C.", "C"),
        ("I cannot say.", ""),
    ],
)
def test_the_letter_that_an_answer_picks(answer: str, letter: str) -> None:
    assert answers.picked(answer) == letter


def test_a_choice_by_letter_or_number() -> None:
    assert answers.choice("The answer is B", "(b)") == answers.choice("B", 1) == 1
    assert answers.choice("The answer is B", "C") == 0
    assert answers.choice("The answer is b", "b", letters="abcd") == answers.choice("The answer is b", 1, letters="abcd") == 1
    assert answers.choice("The answer is 2", "2", letters="1234") == 1
    assert answers.choice("The answer is 3", "2", letters="1234") == 0


def test_pattern() -> None:
    assert answers.pattern("<think>x</think> 4", pattern=r"^<think>.*</think>") == 1
    assert answers.pattern("4", "^[0-9]$") == 1
    assert answers.pattern("<answer>Four</answer>", "four", r"<answer>(?P<answer>.*)</answer>") == 1
    assert answers.pattern("<answer>Five</answer>", "four", r"<answer>(?P<answer>.*)</answer>") == 0


def test_no_pattern_is_not_the_pattern_none() -> None:
    with pytest.raises(ValueError, match="neither an option pattern, nor a reference"):
        answers.pattern("None of them.")


def test_json_by_a_schema() -> None:
    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    assert answers.json_answer('{"city": "Oslo"}', schema=schema) == 1
    assert answers.json_answer('Here:\n```json\n{"city": "Oslo"}\n```', json.dumps(schema)) == 1
    assert answers.json_answer('{"city": 3}', schema) == 0
    assert answers.json_answer("Oslo", schema) == 0
    assert answers.json_answer("null") == 1
    with pytest.raises(Exception, match="'nothing' is not valid"):
        answers.json_answer("{}", schema={"type": "nothing"})


def test_a_schema_fetches_nothing(tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Exception, match=r"any\.json"):
        answers.json_answer("{}", {"$ref": (tmp_path / "any.json").as_uri()})
    inside = {"$defs": {"city": {"type": "string"}}, "$ref": "#/$defs/city"}
    assert (answers.json_answer('"Oslo"', inside), answers.json_answer("3", inside)) == (1, 0)


def test_penalties() -> None:
    assert penalties.length("one two three", most=3, over=2) == 0
    assert penalties.length("one two three four", most=3, over=2) == -0.5
    assert penalties.length("one two three four five six", most=3, over=2) == -1
    assert penalties.repetition("a b c d e") == 0
    assert penalties.repetition("a b c a b c") == -0.25  # of four runs one stood there before
    assert penalties.repetition("a") == 0


FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["sea", "ship"]}, "A Ship at sea.", "A shipment at sea."),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "Sea, sea.", "Sea."),
    ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "The seaside.", "The sea."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "Zoo.", "Zoo, zebra."),
    ("language:response_language", {"language": "de"}, "Das ist ein schöner Tag, wir gehen im Wald spazieren.", "This is a fine day."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "It is 3.5 m.", "One. Two! Three?"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n* * *\nTwo.", "One.\n* * *\n* * *\nTwo."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "One two three.", "One two."),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, more.",
        "First.\n\nAnd then.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [street]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Well.\nP.S. Bye", "Well."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n**bold**"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "**one** and * two"),
    ("detectable_format:multiple_sections", {"num_sections": 2, "section_spliter": "Section"}, "Section 1\na\nSection 2\nb", "Section 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<Poem>>\nsea", "<< >>\nsea"),
    ("combination:two_responses", {}, "One.******Two.", "One.******One."),
    ("combination:two_responses", {}, "******\nOne.\n******\nTwo.\n******", "One.******Two.******Three."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. the end.", "The end. So."),
    ("startend:start_checker", {"start_phrase": "Once"}, "Once more.", "More, once."),
    ("startend:quotation", {}, '"Quoted."', '"Quoted.'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "THE SEA is", "THE sea"),
    ("change_case:english_capital", {}, "THE SEA!", "The SEA!"),
    ("change_case:english_lowercase", {}, "the sea!", "The sea!"),
    ("punctuation:no_comma", {}, "One two.", "One, two."),
]


def test_every_instruction_has_a_case() -> None:
    assert list(dict.fromkeys(case[0] for case in FOLLOWED)) == list(CHECKS)


@pytest.mark.parametrize(("name", "arguments", "followed", "broken"), FOLLOWED, ids=[case[0] for case in FOLLOWED])
def test_instruction(name: str, arguments: dict[str, Any], followed: str, broken: str) -> None:
    arguments = arguments | {"other": None}  # the hub's sets have columns for all arguments, null where they are none
    assert follows(followed, name, arguments)
    assert not follows(broken, name, arguments)
    assert not follows(" ", name, arguments)


def test_the_share_of_instructions_and_the_whole_of_them() -> None:
    reference = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, None],
    }
    assert instructions("One two", reference) == 0.5
    assert instructions("One two", reference, whole=True) == 0
    assert instructions('"One two"', reference, whole=True) == 1


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ({"instruction_id_list": ["a:b"], "kwargs": [{}]}, "unknown instruction 'a:b'"),
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": [{}]}, "instruction startend:end_checker: .*end_phrase"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "of one length"),
        ("text", "no instruction_id_list"),
    ],
)
def test_a_reference_that_names_no_instruction(reference: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        instructions("One", reference)


def test_options_are_those_of_the_function() -> None:
    functions.check_options(functions.BUILT_IN["length"], {"most": 3, "over": 2})
    with pytest.raises(TypeError, match="over"):
        functions.check_options(functions.BUILT_IN["length"], {"most": 3})
    with pytest.raises(TypeError, match="how"):
        functions.check_options(functions.BUILT_IN["math"], {"how": "exact"})
