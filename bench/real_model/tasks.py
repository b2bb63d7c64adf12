"""Makes tasks that a program can check out of real prompts: instructions of IFEval's kind, and arithmetic.

python bench/real_model/tasks.py hh.jsonl.gz FOLDER

The first questions of a file of Anthropic-style pairs get an instruction each (rlhf/rewards/instructions.py checks it). Questions are held
out, and whole kinds of instruction; of arithmetic, other numbers of the trained sizes, and larger ones. Files of FOLDER:

    instructions.jsonl       to train on
    instructions_new.jsonl   held-out questions with the trained kinds of instruction
    kinds_new.jsonl          held-out questions with kinds of instruction that are not trained
    sums.jsonl               to train on: + and − of numbers up to 20, × up to 9, about as hard as the model can do now and then
    sums_new.jsonl           others of these sizes
    sums_larger.jsonl        + and − of numbers from 21 to 99
    demonstrations.jsonl     preferred answers to training questions, for stage sft
    text.jsonl               dialogues of held-out questions as plain text, for perplexity

What the file of pairs says stands in them: it is not for a repository.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

Row = dict[str, Any]
Instruction = tuple[str, str, dict[str, Any]]  # what is said, IFEval's name, its arguments

SHORTEST, LONGEST = 12, 160  # characters of a question
HELD_OUT = 0.3  # share of the questions
FORMS = 3  # of each training question, with different instructions
SMALL, LARGE = 20, 99  # numbers that are added up
LARGER = 300  # sums of larger ones
DEMONSTRATIONS, TEXTS = 128, 100
WORDS = ("people", "time", "help", "good", "think", "world", "friend", "water", "family", "question")
ENDINGS = ("That is all.", "I hope this helps.", "Is there anything else?", "Thank you for asking.")
STARTS = ("Sure:", "In short,", "Let me think.", "My friend,")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

TRAINED: tuple[Callable[[random.Random], Instruction], ...] = (
    lambda _: ("Write your whole answer in lowercase letters.", "change_case:english_lowercase", {}),
    lambda _: ("Do not use any commas.", "punctuation:no_comma", {}),
    lambda draw: _counted(draw, "Answer in less than {} words.", "length_constraints:number_words", "num_words", (15, 25, 40)),
    lambda draw: _counted(draw, "Answer in less than {} sentences.", "length_constraints:number_sentences", "num_sentences", (2, 3)),
    lambda draw: _of_list(draw, 'Use the word "{}" in your answer.', "keywords:existence", "keywords", WORDS),
    lambda draw: _of_list(draw, 'Do not use the word "{}".', "keywords:forbidden_words", "forbidden_words", ("the", "and", "not", "you")),
    lambda draw: _of_text(draw, 'End your answer with "{}"', "startend:end_checker", "end_phrase", ENDINGS),
    lambda draw: _of_text(draw, 'Begin your answer with "{}"', "startend:start_checker", "start_phrase", STARTS),
    lambda _: ("Put your whole answer in double quotation marks.", "startend:quotation", {}),
    lambda draw: _number(draw, "Answer with exactly {} bullet points, each a line that begins with *.", "bullet_lists", "bullets", (2, 3)),
    lambda _: ("Give your answer a title in double angular brackets, such as <<a title>>.", "detectable_format:title", {}),
)
NEW: tuple[Callable[[random.Random], Instruction], ...] = (
    lambda _: ("Write your whole answer in CAPITAL LETTERS.", "change_case:english_capital", {}),
    lambda draw: _number(draw, "Highlight {} words with *asterisks*.", "highlighted_sections", "highlights", (1, 2)),
    lambda _: ('End with a postscript that begins with "P.S."', "detectable_content:postscript", {"postscript_marker": "P.S."}),
    lambda draw: (
        'Use the letter "z" less than 1 time.',
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 1, "let_relation": "less than"},
    ),
    lambda _: ("Write your answer as JSON.", "detectable_format:json_format", {}),
    lambda _: ("Put a placeholder in square brackets into your answer, such as [name].", "detectable_content:number_placeholders", {
        "num_placeholders": 1
    }),
)  # fmt: skip


def main(
    pairs: Annotated[Path, typer.Argument(help="JSON lines with `chosen` dialogues; may end in .gz.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the files.")],
    seed: Annotated[int, typer.Option(help="Other seeds make other rows.")] = 1,
) -> None:
    """Write the files, and print how many rows each has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {**of_questions(read(pairs), random.Random(seed)), **arithmetic(random.Random(seed))}.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def read(path: Path) -> dict[str, tuple[str, str]]:
    """By first question: its preferred answer, and the whole dialogue. Each question once, in the order of the file."""
    found: dict[str, tuple[str, str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            dialogue = json.loads(line)["chosen"]
            asked, _, rest = dialogue.removeprefix(HUMAN).partition(ASSISTANT)
            question, answer = asked.strip(), rest.partition(HUMAN)[0].strip()
            if SHORTEST <= len(question) <= LONGEST and answer:
                found.setdefault(question, (answer, dialogue.strip()))
    return found


# ---------------------------------------------------------------------------------------------------------- instructions


def of_questions(questions: dict[str, tuple[str, str]], draw: random.Random) -> dict[str, list[Row]]:
    """The files made of real questions; no question is in a training and in a held-out one."""
    shuffled = draw.sample(list(questions), len(questions))
    held_out, trained = shuffled[: int(HELD_OUT * len(shuffled))], shuffled[int(HELD_OUT * len(shuffled)) :]
    return {
        "instructions": [instructed(question, make, draw) for question in trained for make in draw.sample(TRAINED, FORMS)],
        "instructions_new": [instructed(question, make, draw) for question in held_out for make in draw.sample(TRAINED, 1)],
        "kinds_new": [instructed(question, make, draw) for question in held_out for make in draw.sample(NEW, 1)],
        "demonstrations": [{"question": question, "answer": questions[question][0]} for question in trained[:DEMONSTRATIONS]],
        "text": [{"text": questions[question][1]} for question in held_out[:TEXTS]],
    }


def instructed(question: str, make: Callable[[random.Random], Instruction], draw: random.Random) -> Row:
    said, name, arguments = make(draw)
    reference = {"instruction_id_list": [name], "kwargs": [arguments]}
    return {"prompt": f"{question}\n\n{said}", "reference": reference, "kind": name}


def _counted(draw: random.Random, said: str, name: str, key: str, choices: tuple[int, ...]) -> Instruction:
    count = draw.choice(choices)
    return said.format(count), name, {key: count, "relation": "less than"}


def _number(draw: random.Random, said: str, name: str, key: str, choices: tuple[int, ...]) -> Instruction:
    count = draw.choice(choices)
    return said.format(count), f"detectable_format:number_{name}", {f"num_{key}": count}


def _of_list(draw: random.Random, said: str, name: str, key: str, choices: tuple[str, ...]) -> Instruction:
    word = draw.choice(choices)
    return said.format(word), name, {key: [word]}


def _of_text(draw: random.Random, said: str, name: str, key: str, choices: tuple[str, ...]) -> Instruction:
    phrase = draw.choice(choices)
    return said.format(phrase), name, {key: phrase}


# ------------------------------------------------------------------------------------------------------------ arithmetic


def arithmetic(draw: random.Random) -> dict[str, list[Row]]:
    """The three files of sums; none is in two of them."""
    known = [*pairs_of(range(1, SMALL + 1)), *((first, "*", second) for first in range(2, 10) for second in range(2, first + 1))]
    larger = [found for found in pairs_of(range(1, LARGE + 1)) if found[0] > SMALL]
    shuffled, count = draw.sample(known, len(known)), int(HELD_OUT * len(known))
    files = {"sums": shuffled[count:], "sums_new": shuffled[:count], "sums_larger": draw.sample(larger, LARGER)}
    return {name: [asked(*found) for found in rows] for name, rows in files.items()}


def pairs_of(numbers: range) -> Iterator[tuple[int, str, int]]:
    """Sums and differences, none of them below zero."""
    return ((first, sign, second) for sign in "+-" for first in numbers for second in numbers if second <= first)


def asked(first: int, sign: str, second: int) -> Row:
    prompt = f"Calculate {first} {sign} {second}. Answer with the number alone."
    return {"prompt": prompt, "reference": str(result(first, sign, second)), "kind": f"sums {sign}"}


def result(first: int, sign: str, second: int) -> int:
    return {"+": first + second, "-": first - second, "*": first * second}[sign]


if __name__ == "__main__":
    typer.run(main)
