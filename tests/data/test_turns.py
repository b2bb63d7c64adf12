"""Turns in the forms that people have them: marks of what is not to be learnt, calls of tools, contents in parts, other names."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.examples import dialogue
from rlhf.data.fields import BadRow
from rlhf.data.formats import Quarantined, Row
from rlhf.data.prepared import as_text
from rlhf.data.turns import keyed_turns, marked_turns
from rlhf.data.validate import Checker
from tests.data.test_formats import only, reason

ASK, AGAIN = {"role": "user", "content": "Name a red fruit."}, {"role": "user", "content": "Are you sure?"}
WRONG, RIGHT = {"role": "assistant", "content": "Bananas."}, {"role": "assistant", "content": "A cherry."}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "fruit"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "cherry"}


def row_of(form: str, tmp_path: Path, record: Any, columns: dict[str, str | None] | None = None) -> Row:
    row = only(form, tmp_path, record, columns)
    assert isinstance(row, Row), row
    assert Checker(1000).problem(row) is None
    return row


# ------------------------------------------------------------------------------------------------------------------ marks


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"loss": 0}, {"loss": False}, {"trainable": False}, {"train": False}, {"loss_weight": 0}]
)
def test_an_answer_marked_as_not_to_be_learnt_keeps_its_mark(mark: dict[str, Any], tmp_path: Path) -> None:
    row = row_of("messages", tmp_path, {"messages": [ASK, WRONG | mark, AGAIN, RIGHT | dict.fromkeys(mark, 1)]})
    assert (row.prompt, row.chosen, row.unread) == ((ASK, WRONG | {"weight": 0}, AGAIN), "A cherry.", ())
    assert as_text(row) == {"text": "Human: Are you sure?\n\nAssistant: A cherry."}


def test_what_follows_the_last_answer_to_be_learnt_is_left_out(tmp_path: Path) -> None:
    messages = [ASK, RIGHT, AGAIN, WRONG | {"weight": 0}]
    assert row_of("messages", tmp_path, {"messages": messages}) == row_of("messages", tmp_path, {"messages": messages[:2]})
    nothing = only("messages", tmp_path, {"messages": [ASK, WRONG | {"weight": 0}]})
    assert reason(nothing) == "no answer: every answer in 'messages' is marked as not to be learnt"
    pair = {"prompt": [ASK], "chosen": [RIGHT | {"weight": 0}], "rejected": [WRONG]}
    assert reason(only("pairs", tmp_path, pair)) == "no answer: 'chosen' is marked as not to be learnt"


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ({"weight": 0.5}, "malformed: turn 2 of 'messages' has weight 0.5, not 0 or 1"),
        ({"train": "no"}, "malformed: turn 2 of 'messages' has train 'no', not 0 or 1"),
        ({"mask": True}, "malformed: turn 2 of 'messages' has 'mask', which is not read: mark it with weight 0 or 1"),
        ({"weight": 0, "train": True}, "malformed: turn 2 of 'messages' is marked both as to be learnt and as not to be: weight, train"),
    ],
)
def test_marks_that_cannot_be_honoured_are_named(mark: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert reason(only("messages", tmp_path, {"messages": [ASK, RIGHT | mark]})) == expected


def test_null_is_no_mark_and_unknown_fields_are_named(tmp_path: Path) -> None:
    turn: dict[str, Any] = RIGHT | {"weight": None, "loss": True, "mood": "glad", "tool_calls": None, "votes": []}
    row = row_of("messages", tmp_path, {"messages": [ASK | {"name": "Ada"}, turn], "id": 7})
    assert (dialogue(row), row.unread) == ((ASK, RIGHT), ("turns.mood", "turns.name", "id"))


# ------------------------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": RIGHT["content"]}],
        [{"role": "user", "value": ASK["content"]}, {"role": "model", "text": RIGHT["content"]}],
        {"from": ["human", "gpt"], "value": [ASK["content"], RIGHT["content"]]},  # of a `Sequence` of datasets
        [{"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "red fruit."}]}, RIGHT],
    ],
)
def test_turns_under_other_names(messages: Any, tmp_path: Path) -> None:
    row = row_of("messages", tmp_path, {"messages": messages})
    assert (dialogue(row), row.unread) == ((ASK, RIGHT), ())


def test_parts_that_are_no_text_are_named(tmp_path: Path) -> None:
    ask = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    expected = "malformed: turn 1 of 'messages' has a part of type 'image_url', and only text can be read"
    assert reason(only("messages", tmp_path, {"messages": [ask, RIGHT]})) == expected
    shown = {"messages": [ASK, RIGHT], "images": ["a.png"]}
    assert reason(only("messages", tmp_path, shown)) == "malformed: the row has 'images', and only text can be read"


def test_a_prompt_and_its_answer_as_lists_of_turns(tmp_path: Path) -> None:
    for answer in (RIGHT["content"], [RIGHT], [ASK, RIGHT]):
        row = row_of("qa", tmp_path, {"prompt": [ASK], "completion": answer}, {"question": "prompt", "answer": "completion"})
        assert dialogue(row) == (ASK, RIGHT)


# ------------------------------------------------------------------------------------------------------------------ tools

OPENAI = [
    ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "fruit"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "cherry"},
    RIGHT,
]
OLD_OPENAI = [
    ASK,
    {"role": "assistant", "content": None, "function_call": {"name": "look_up", "arguments": '{"word": "fruit"}'}},
    {"role": "function", "name": "look_up", "content": "cherry"},
    RIGHT,
]
SHAREGPT = [
    {"from": "human", "value": ASK["content"]},
    {"from": "function_call", "value": '{"name": "look_up", "arguments": {"word": "fruit"}}'},
    {"from": "observation", "value": "cherry"},
    {"from": "gpt", "value": RIGHT["content"]},
]
TOOL = {"name": "look_up", "description": "Looks a word up.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("messages", [OPENAI, OLD_OPENAI, SHAREGPT])
@pytest.mark.parametrize("tools", [[{"type": "function", "function": TOOL}], [TOOL], json.dumps([TOOL])])
def test_calls_of_tools(messages: list[dict[str, Any]], tools: Any, tmp_path: Path) -> None:
    row = row_of("messages", tmp_path, {"messages": messages, "tools": tools})
    ask, calling, result, answer = dialogue(row)
    assert ask == ASK | {"tools": [{"type": "function", "function": TOOL}]}
    assert calling["tool_calls"][0]["function"] == CALL["function"]
    assert (calling["content"], result["role"], result["content"], answer) == ("", "tool", "cherry", RIGHT)
    assert row.unread == ()


def test_a_dialogue_that_ends_in_a_call(tmp_path: Path) -> None:
    row = row_of("messages", tmp_path, {"messages": SHAREGPT[:2]})
    assert (dialogue(row), row.chosen) == ((ASK, CALLING), "")
    assert as_text(row)["text"] == 'Human: Name a red fruit.\n\nAssistant: {"name": "look_up", "arguments": {"word": "fruit"}}'
    pair = only("pairs", tmp_path, {"prompt": [ASK], "chosen": [CALLING], "rejected": [WRONG]})
    assert reason(pair) == "malformed: the answer in 'chosen' has 'tool_calls', and an answer of a pair is its text alone"


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"tool_calls": "{oops"}, "malformed: the call in turn 1 of 'm' is not JSON"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "malformed: turn 1 of 'm' calls a tool without a name"),
        ({"tool_calls": [{"name": "f", "arguments": "{oops"}]}, "malformed: the arguments of 'f' in turn 1 of 'm' is not JSON"),
        ({"tool_calls": '[{"name": "\\ud800"}]'}, "not UTF-8: the call in turn 1 of 'm' has a lone surrogate"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "malformed: the arguments of 'f' in turn 1 of 'm' are no object"),
        ({"tool_calls": [{"name": "f", "arguments": {"at": date(2026, 1, 1)}}]}, "malformed: the call in turn 1 of 'm' is not JSON"),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": ' + "[" * 300 + "]" * 300 + "}"}]}, "malformed: nested too deeply"),
    ],
)
def test_damaged_calls(turn: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadRow) as caught:
        keyed_turns([{"role": "assistant", "content": "", **turn}], "m")
    assert str(caught.value) == expected


def test_thoughts_stay_beside_the_answer(tmp_path: Path) -> None:
    row = row_of("messages", tmp_path, {"messages": [ASK, RIGHT | {"reasoning_content": "Red: cherry."}]})
    assert (row.chosen, row.beside) == ("A cherry.", {"reasoning_content": "Red: cherry."})


# ------------------------------------------------------------------------------------------------------- beside the dialogue


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_in_a_column_of_its_own(column: str, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be exact."}
    records: dict[str, dict[str, Any]] = {
        "messages": {"messages": [ASK, RIGHT]},
        "qa": {"question": ASK["content"], "answer": RIGHT["content"]},
        "pairs": {"prompt": ASK["content"], "chosen": RIGHT["content"], "rejected": WRONG["content"]},
    }
    for form, record in records.items():
        assert row_of(form, tmp_path, record | {column: "Be exact."}).prompt == (system, ASK)
        assert row_of(form, tmp_path, record | {column: ""}).prompt == row_of(form, tmp_path, record | {column: None}).prompt == (ASK,)
    same = {"messages": [system, ASK, RIGHT], column: "Be exact."}
    assert row_of("messages", tmp_path, same).prompt == (system, ASK)
    other = only("messages", tmp_path, same | {column: "Be vague."})
    assert reason(other) == f"malformed: '{column}' is not what the dialogue's own system turn says"


# ---------------------------------------------------------------------------------------------------------------- markers


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: 你好\n\nAssistant: 您好",
        "\n\nHuman：你好\n\nAssistant：您好",
        "User: 你好\n\nAssistant: 您好",
        "用户：你好\n助手：您好",
        "\n\n用户: 你好\n\n助手: 您好",
        "人类：你好\n\n助理：您好",
        "ユーザー：你好\nアシスタント：您好",
    ],
)
def test_markers_of_other_languages(text: str) -> None:
    assert marked_turns(text, "m") == ({"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"})


def test_markers_of_another_kind_are_words_of_the_dialogue() -> None:
    text = "Write a dialogue.\n\nUser: Hi\n\n用户：你好"
    assert marked_turns(f"Human: {text}\nHuman: x", "m") == ({"role": "user", "content": f"{text}\nHuman: x"},)


def test_quarantine_is_by_row(tmp_path: Path) -> None:
    assert isinstance(only("hh", tmp_path, {"chosen": "问：你好", "rejected": "答：您好"}), Quarantined)


# ---------------------------------------------------------------------------------------------------- roles, turns in texts


def test_roles_may_stand_in_capitals(tmp_path: Path) -> None:
    plain = row_of("messages", tmp_path, {"messages": [ASK, RIGHT]})
    for asks, answers in (("User", "Assistant"), ("HUMAN", "GPT"), ("user", "bot"), ("Human", "AI")):
        assert row_of("messages", tmp_path, {"messages": [ASK | {"role": asks}, RIGHT | {"role": answers}]}) == plain
    unknown = only("messages", tmp_path, {"messages": [ASK, RIGHT | {"role": "Wizard"}]})
    assert reason(unknown) == "no assistant turn: 'messages' ends in a turn of role 'Wizard'"


def test_a_list_of_turns_may_stand_in_a_text(tmp_path: Path) -> None:
    messages = [ASK, RIGHT | {"mood": "calm"}]
    assert row_of("messages", tmp_path, {"messages": json.dumps(messages)}) == row_of("messages", tmp_path, {"messages": messages})
    damaged = only("messages", tmp_path, {"messages": json.dumps(messages)[:-3]})
    assert reason(damaged) == "malformed: 'messages' is not JSON"
    # where a text is asked for, it is one
    for text in ('[{"a": 1}]', "[{ no JSON"):
        assert row_of("pairs", tmp_path, {"prompt": text, "chosen": text, "rejected": "No."}).chosen == text
