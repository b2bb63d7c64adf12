"""Dialogues out of records: lists of turns, in the forms that datasets have them, and texts with a marker before each turn."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from rlhf.data.fields import BadRow, Fields, Record, Turn, Turns, check_texts, string

SPEAKERS, TEXTS = ("role", "from"), ("content", "value", "text")
ROLES = {"human": "user", "prompter": "user", "developer": "system", "observation": "tool", "function": "tool"}
ROLES |= {"function_response": "tool", "tool_response": "tool", "function_call": "assistant"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "bot", "ai"), "assistant")
OWN = ("system", "user", "assistant", "tool")
# what datasets call it that an assistant's turn is not to be learnt
MARKS = ("weight", "loss", "loss_weight", "trainable", "train", "train_on_turn")
UNCLEAR = ("mask", "masked", "loss_mask", "train_detail")  # 1 means either, or only a part of the turn
CALLS = ("tool_calls", "function_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
OF_TOOLS = ("name", "tool_call_id")
KNOWN = frozenset((*SPEAKERS, *TEXTS, *MARKS, *CALLS, *THOUGHTS))
PLAIN = {"role", "content"}
BESIDE_TEXT = ("tool_calls", *THOUGHTS)  # what an answer may hold beside its text


def asks(question: str) -> Turns:
    return ({"role": "user", "content": question},)


def turns(record: Record, column: str) -> Turns:
    """A dialogue: a list of turns, also as JSON in a text, or Anthropic's text."""
    value = record[column]
    if _is_json(value):
        value = _parsed(value, f"'{column}'")
    return keyed_turns(value, column) if isinstance(value, list | dict) else marked_turns(string(record, column), column)


def _is_json(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[{")


def turns_or_question(record: Record, column: str) -> Turns:
    """A list of turns, or the text of a user's only turn."""
    return turns(record, column) if isinstance(record[column], list | dict) else asks(string(record, column))


# --------------------------------------------------------------------------------------------------------- lists of turns


def keyed_turns(value: Any, column: str, role: str = "role", content: str = "content") -> Turns:
    """A list of objects, one a turn.

    Args:
        role, content: the keys of an object that say who speaks, and what; where they are not there, one of the other usual ones.
    """
    value = _as_list(value)
    if not isinstance(value, list):
        raise BadRow(f"malformed: '{column}' is of type {type(value).__name__}, not a list of turns")
    found = []
    for place, turn in enumerate(value, start=1):
        if _is_plain(turn):
            found.append(dict(turn))
            continue
        where = f"turn {place} of '{column}'"
        speaker, text = (_first(turn, names) for names in ((role, *SPEAKERS), (content, *TEXTS)))
        calls = any(turn.get(name) for name in CALLS) if isinstance(turn, dict) else False
        said = _text(turn[text], where) if text else "" if calls else None
        if not (speaker and isinstance(turn[speaker], str) and isinstance(said, str)):
            raise BadRow(f"malformed: {where} is not an object with {role} and {content} as text")
        found.append(_turn(turn, turn[speaker], said, where))
    return tuple(found)


def _as_list(value: Any) -> Any:
    """A list of turns, out of what `datasets` makes of one in a `Sequence`: an object of lists."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        columns = list(value.values())
        if all(len(column) == len(columns[0]) for column in columns):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    return value


def _is_plain(turn: Any) -> bool:
    """Whether there is nothing to read but a role and a text: almost all turns are so."""
    return (
        isinstance(turn, dict)
        and turn.keys() == PLAIN
        and isinstance(turn["content"], str)
        and isinstance(turn["role"], str)
        and turn["role"] in OWN
    )


def _role(speaker: str) -> str:
    """The role of a speaker, who may stand there in capitals; an unknown one's own name."""
    known = ROLES.get(speaker.lower(), speaker.lower())
    return known if known in OWN else speaker


def _first(turn: Any, names: Collection[str]) -> str | None:
    return next((name for name in names if turn.get(name) is not None), None) if isinstance(turn, dict) else None


def _text(value: Any, where: str) -> Any:
    """The text of a content in parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not (isinstance(part, dict) and isinstance(part.get("text"), str) and kind in ("text", "input_text", "output_text")):
            raise BadRow(f"malformed: {where} has a part of type '{kind}', and only text can be read")
    return "".join(part["text"] for part in value)


def _turn(turn: Record, speaker: str, said: str, where: str) -> Turn:
    role = _role(speaker)
    made: Turn = {"role": role, "content": said}
    if speaker.lower() == "function_call":
        made |= {"content": "", "tool_calls": _calls(said, where)}
    elif role == "assistant" and (calls := turn.get("tool_calls") or turn.get("function_call")):
        made["tool_calls"] = _calls(calls, where)
    passed = OF_TOOLS if role == "tool" else THOUGHTS if role == "assistant" else ()
    made |= {name: string(turn, name) for name in passed if turn.get(name)}
    return made if _learnt(turn, where) else made | {"weight": 0}


def _learnt(turn: Record, where: str) -> bool:
    """Whether a turn is not marked as one that is not to be learnt."""
    if unclear := [name for name in UNCLEAR if turn.get(name) is not None]:
        raise BadRow(f"malformed: {where} has '{unclear[0]}', which is not read: mark it with weight 0 or 1")
    marks = {name: turn[name] for name in MARKS if turn.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(f"malformed: {where} has {name} {value!r}, not 0 or 1")
    if len(set(map(bool, marks.values()))) > 1:
        raise BadRow(f"malformed: {where} is marked both as to be learnt and as not to be: {', '.join(marks)}")
    return all(marks.values())


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of functions as chat templates read them: arguments as an object."""
    calls = _parsed(value, f"the call in {where}")
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
            raise BadRow(f"malformed: {where} calls a tool without a name")
        arguments = _parsed(function.get("arguments") or {}, f"the arguments of '{function['name']}' in {where}")
        if not isinstance(arguments, dict):
            raise BadRow(f"malformed: the arguments of '{function['name']}' in {where} are no object")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def _parsed(value: Any, what: str) -> Any:
    """A value that may stand there as a text; what JSON cannot say comes out of tables."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRow(f"not UTF-8: {what} has a lone surrogate") from None
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"malformed: {what} is not JSON") from None
    check_texts(parsed)
    return parsed


def unread(record: Record, columns: Collection[str]) -> tuple[str, ...]:
    """Names of the fields of turns that nothing reads."""
    lists = (value for value in map(_as_list, map(_list_in, map(record.get, columns))) if isinstance(value, list))
    found = (turn for value in lists for turn in value if not _is_plain(turn) and _first(turn, SPEAKERS))
    return tuple(sorted({f"turns.{name}" for turn in found for name in _unread(turn)}))


def _list_in(value: Any) -> Any:
    """A list that stands in a text, if one does."""
    with suppress(BadRow):
        return _parsed(value, "") if _is_json(value) else value
    return value


def _unread(turn: Record) -> Iterator[str]:
    role = _role(str(_value(turn, SPEAKERS)))
    for name, value in turn.items():
        if value is None or value in ("", [], {}):
            continue
        if (name not in KNOWN and not (role == "tool" and name in OF_TOOLS)) or (role != "assistant" and name in (*CALLS, *THOUGHTS)):
            yield name


def _value(turn: Record, names: Collection[str]) -> Any:
    name = _first(turn, names)
    return turn[name] if name else None


# ------------------------------------------------------------------------------------------------------ texts with markers

# who asks, who answers, what stands before a marker: one dialogue has markers of one kind
_MARKERS = (
    ("Human", "Assistant", r"\n\n"),
    ("User", "Assistant", r"\n\n"),
    ("用户|用戶|使用者|人类|人類", "助手|助理|AI助手", r"\n\s*"),
    ("ユーザー|ユーザ|人間", "アシスタント", r"\n\s*"),
)


def marked_turns(text: str, column: str) -> Turns:
    """Anthropic's form: each turn begins with an empty line and ``Human:`` or ``Assistant:``; or Chinese and Japanese words for them."""
    text = text.strip()
    for user, assistant, before in _MARKERS:
        if re.match(rf"(?:{user}|{assistant})[:：]", text):
            _, *parts = re.split(rf"{before}({user}|{assistant})[:：]", "\n\n" + text)
            roles = ("assistant" if re.fullmatch(assistant, name) else "user" for name in parts[::2])
            return tuple({"role": role, "content": content.strip()} for role, content in zip(roles, parts[1::2], strict=True))
    if not text:
        return ()
    raise BadRow(f"malformed: '{column}' does not begin with 'Human:' or 'Assistant:'")


# ---------------------------------------------------------------------------------------------------------------- answers


def last_answer(dialogue: Turns, column: str) -> tuple[Turns, Turn]:
    """The turns before the last answer, and that answer."""
    if not dialogue:
        raise BadRow(f"empty: '{column}' has no turns")
    if dialogue[-1]["role"] != "assistant":
        raise BadRow(f"no assistant turn: '{column}' ends in a turn of role '{dialogue[-1]['role']}'")
    return dialogue[:-1], dialogue[-1] | {"content": dialogue[-1]["content"].strip()}


def demonstration(dialogue: Turns, column: str) -> Fields:
    """A dialogue up to the last answer that is to be learnt: what follows is not, and nothing that is depends on it."""
    last_answer(dialogue, column)
    learnt = [place for place, turn in enumerate(dialogue) if turn["role"] == "assistant" and "weight" not in turn]
    if not learnt:
        raise BadRow(f"no answer: every answer in '{column}' is marked as not to be learnt")
    return {"prompt": dialogue[: learnt[-1]], **answered(last_answer(dialogue[: learnt[-1] + 1], column)[1])}


def answered(answer: Turn) -> Fields:
    return {"chosen": answer["content"], "beside": {name: answer[name] for name in BESIDE_TEXT if name in answer} or None}


def plain(answer: Turn, column: str) -> str:
    """An answer of a pair."""
    if len(answer) > len(PLAIN) and (more := [name for name in BESIDE_TEXT if name in answer]):
        raise BadRow(f"malformed: the answer in '{column}' has '{more[0]}', and an answer of a pair is its text alone")
    return str(answer["content"])


# ------------------------------------------------------------------------------------------------- what stands beside them

SYSTEM_COLUMNS = ("system", "system_prompt")
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
BESIDE = {*SYSTEM_COLUMNS, *NOT_TEXT, "tools"}


def complete(record: Record, fields: Fields, columns: Collection[str]) -> Fields:
    """The fields of a row, with what a record says of the dialogue in columns beside it: its system prompt, its tools.

    Args:
        columns: those that the row was made from.
    """
    if "prompt" not in fields:
        return fields
    if not (record.keys() & BESIDE or "tools" in fields):
        return fields | {"unread": unread(record, columns)}
    for name in NOT_TEXT:
        if record.get(name) and name not in columns:
            raise BadRow(f"malformed: the row has '{name}', and only text can be read")
    prompt = fields["prompt"]
    for column in SYSTEM_COLUMNS:
        if column not in columns and record.get(column) not in (None, ""):
            prompt = _with_system(prompt, string(record, column), column)
    tools = fields.get("tools") or ("tools" not in columns and record.get("tools"))
    if tools and prompt:
        prompt = (prompt[0] | {"tools": _tools(tools)}, *prompt[1:])
    plain = {name: value for name, value in fields.items() if name != "tools"}
    return plain | {"prompt": prompt, "unread": unread(record, columns)}


def _with_system(prompt: Turns, text: str, column: str) -> Turns:
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() != text.strip():
            raise BadRow(f"malformed: '{column}' is not what the dialogue's own system turn says")
        return prompt
    return ({"role": "system", "content": text}, *prompt) if text.strip() else prompt


def _tools(value: Any) -> list[Mapping[str, Any]]:
    """Descriptions of functions as chat templates read them."""
    tools = _parsed(value, "'tools'")
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("malformed: 'tools' is not a list of objects")
    made = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in made):
        raise BadRow("malformed: 'tools' has one without a name")
    return made


def left_over(record: Record, columns: Collection[str]) -> list[str]:
    """Names of the columns that hold something and that nothing reads."""
    return [name for name in record if name not in columns and name not in BESIDE and record[name] not in (None, "", [], {})]
