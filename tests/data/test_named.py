"""Every named dataset: a row in its own columns, worked out by hand, and rows that are not as they should be."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rlhf import config
from rlhf.config.data import MessagesDataset, NamedSource, PairsDataset, VerifiableDataset
from rlhf.data.formats import Quarantined, Row, read
from rlhf.data.named import DATASETS
from rlhf.data.validate import turns_problem
from rlhf.errors import UserError
from tests.data.ranked_rows import RANKED

ROOT = Path(__file__).parents[2]
NOTHING = {"text": 0, "sft": 0, "reward": 0, "ppo": 0, "judge": 0, "heldout": 0}
HH = {
    "prompt": "\n\nHuman: Hi!\n\nAssistant: Yes?\n\nHuman: Why: me?\n\nAssistant:",
    "response": " So.",
    "chosen": " So.",
    "rejected": " No.",
}
HH_PROMPT = [("user", "Hi!"), ("assistant", "Yes?"), ("user", "Why: me?")]
PASSAGES = [{"docid": "1#0", "title": "富士山", "text": "3776 mです。"}, {"docid": "1#1", "title": "富士山", "text": "他の文。"}]
MESSAGE = {"message_id": "m", "user_id": "u", "lang": "en", "deleted": False, "rank": None}
TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": MESSAGE
    | {
        "role": "prompter",
        "text": "Hi!",
        "replies": [
            MESSAGE | {"role": "assistant", "text": "Go away.", "rank": 1, "replies": []},
            MESSAGE
            | {
                "role": "assistant",
                "text": "Hello!",
                "rank": 0,
                "replies": [
                    MESSAGE
                    | {
                        "role": "prompter",
                        "text": "How are you?",
                        "replies": [
                            MESSAGE | {"role": "assistant", "text": "Fine.", "replies": [MESSAGE | {"role": "prompter", "text": "Good."}]}
                        ],
                    }
                ],
            },
        ],
    },
}
MKQA = {
    "example_id": 5,
    "query": "who wrote it",
    "queries": {"zh_cn": "谁写的", "ja": "誰が書いた"},
    "answers": {
        "zh_cn": [{"type": "entity", "entity": "Q1", "text": "鲁迅", "aliases": []}],
        "ja": [{"type": "entity", "entity": "Q1", "text": "魯迅", "aliases": ["ろじん"]}],
    },
}
JAQUAD = {"paragraph": "富士山は高い。3776 mである。", "sentence": "3776 mである。", "paragraph_id": "p"}

# name: a row of the dataset, its prompt, the (better) answer, the other one
ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], str, str | None]] = {
    "rm-static": (HH, HH_PROMPT, "So.", "No."),
    "full-hh-rlhf": (HH, HH_PROMPT, "So.", "No."),
    "synthetic-instruct-gptj-pairwise": (
        {"prompt": "Name a planet.", "chosen": "Mars is one.", "rejected": "Pizza"},
        [("user", "Name a planet.")],
        "Mars is one.",
        "Pizza",
    ),
    "rlhf-reward-datasets": (
        {"prompt": "\n\nHuman: Hi!\n\nAssistant: Yes?\n\nHuman: Why: me?\n\n", "chosen": "Assistant: So.", "rejected": "Assistant: No."},
        HH_PROMPT,
        "So.",
        "No.",
    ),
    "webgpt": (
        {
            "question": {"dataset": "eli5", "id": "q1", "full_text": "Why is the sky blue?"},
            "quotes_0": {"title": ["a"], "extract": ["b"]},
            "answer_0": "It is painted.",
            "tokens_0": {"prefix": [1], "completion": [2]},
            "score_0": -0.5,
            "quotes_1": {"title": ["a"], "extract": ["b"]},
            "answer_1": "Scattering [1].",
            "tokens_1": {"prefix": [1], "completion": [2]},
            "score_1": 0.5,
        },
        [("user", "Why is the sky blue?")],
        "Scattering [1].",
        "It is painted.",
    ),
    "shp": (
        {
            "post_id": "p",
            "domain": "askculinary_train",
            "upvote_ratio": 0.98,
            "history": "How do I boil an egg?",
            "human_ref_A": "In a pan.",
            "human_ref_B": "In water.",
            "score_A": 4,
            "score_B": 9,
            "labels": 0,
            "seconds_difference": 50.0,
            "score_ratio": 2.25,
        },
        [("user", "How do I boil an egg?")],
        "In water.",
        "In a pan.",
    ),
    "miracl": (
        {"query_id": "1", "query": "富士山の高さは？", "positive_passages": PASSAGES[:1], "negative_passages": PASSAGES[1:], "emb": [0.1]},
        [("user", "富士山の高さは？")],
        "3776 mです。",
        "他の文。",
    ),
    "alpaca": (
        {"instruction": "Add them.", "input": "2 and 2", "output": "4", "text": "Below is …"},
        [("user", "Add them.\n\n2 and 2")],
        "4",
        None,
    ),
    "sharegpt": (
        {
            "id": "x_0",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi!"},
                {"from": "gpt", "value": "Yes?"},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "So."},
            ],
        },
        [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Yes?"), ("user", "Why?")],
        "So.",
        None,
    ),
    "vicuna": (
        {"prompt": "Be brief. USER: Hi! ASSISTANT: Yes?</s> USER: Why? ASSISTANT:", "label": "So.</s>"},
        [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Yes?"), ("user", "Why?")],
        "So.",
        None,
    ),
    "oasst": (TREE, [("user", "Hi!"), ("assistant", "Hello!"), ("user", "How are you?")], "Fine.", None),
    "zhihu-kol": (
        {"INSTRUCTION": "怎么说服男朋友？", "RESPONSE": "好好说。", "SOURCE": "Zhihu", "METADATA": "{}"},
        [("user", "怎么说服男朋友？")],
        "好好说。",
        None,
    ),
    "hc3": (
        {
            "id": "0",
            "question": "什么是基金？",
            "human_answers": ["一种投资。", "钱。"],
            "chatgpt_answers": ["基金是……"],
            "source": "finance",
        },
        [("user", "什么是基金？")],
        "一种投资。",
        None,
    ),
    "mkqa-zh": (MKQA, [("user", "谁写的")], "鲁迅", None),
    "mkqa-ja": (MKQA, [("user", "誰が書いた")], "魯迅", None),
    "qg-jaquad": (JAQUAD | {"question": "高さは？", "answer": "3776 m"}, [("user", "高さは？")], "3776 mである。", None),
    "qag-jaquad": (
        JAQUAD | {"questions": ["高さは？", "高い？"], "answers": ["3776 m", "はい"], "questions_answers": "question: …"},
        [("user", "高さは？")],
        "富士山は高い。3776 mである。",
        None,
    ),
}

ROWS |= RANKED


def results(form: str, rows: list[dict[str, Any]], folder: Path) -> list[Row | Quarantined]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    place = {"path": "rows.jsonl", "hub": None, "revision": None, "hub_split": None}
    source = NamedSource.model_validate({"name": "named", "format": form, "split": NOTHING, "weight": 1, **place})
    return list(read(source, "data.sources.0", folder, 1))


@pytest.mark.parametrize("form", ROWS)
def test_a_row_of_the_dataset(form: str, tmp_path: Path) -> None:
    row, turns, chosen, rejected = ROWS[form]
    prompt = tuple({"role": role, "content": content} for role, content in turns)
    kind = "messages" if rejected is None else "pairs"
    assert results(form, [row], tmp_path) == [Row("named", "rows.jsonl", 1, kind, prompt, chosen, rejected)]
    assert turns_problem(prompt) is None


def test_every_dataset_of_the_schema_has_a_reader() -> None:
    by_kind = {*get_args(PairsDataset), *get_args(MessagesDataset)}
    assert by_kind == {*ROWS, "helpsteer"}
    assert set(DATASETS) == by_kind | set(get_args(VerifiableDataset))  # of which test_verifiable.py has the rows


def changed(form: str, path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    row = deepcopy(ROWS[form][0])
    holder: Any = row
    for part in path[:-1]:
        holder = holder[part]
    holder[path[-1]] = value
    return row


@pytest.mark.parametrize(
    ("form", "path", "value", "reason"),
    [
        ("rm-static", ("prompt",), "Hi!", "malformed: 'prompt' does not begin with 'Human:' or 'Assistant:'"),
        ("full-hh-rlhf", ("rejected",), 5, "malformed: 'rejected' is of type int, not text"),
        ("synthetic-instruct-gptj-pairwise", ("chosen",), None, "empty: 'chosen' is null"),
        ("webgpt", ("question",), "Why?", "malformed: no 'question.full_text'"),
        ("webgpt", ("question", "full_text"), None, "empty: 'question.full_text' is null"),
        ("webgpt", ("score_0",), "much", "malformed: 'score_0' is 'much', not a number"),
        ("webgpt", ("score_1",), -0.5, "tie: 'score_0' equals 'score_1'"),
        ("shp", ("labels",), 2, "malformed: 'labels' is 2, not 0 or 1"),
        ("shp", ("score_A",), 9, "tie: 'score_A' equals 'score_B'"),
        ("shp", ("score_B",), float("nan"), "malformed: 'score_B' is nan, not a number"),
        ("miracl", ("negative_passages",), [], "no answer: 'negative_passages' is empty"),
        ("miracl", ("positive_passages",), ["text"], "malformed: no 'positive_passages.0.text'"),
        ("nectar", ("answers", 0, "rank"), None, "malformed: 'rank' is None, not a number"),
        ("nectar", ("answers", 0), {"answer": "x"}, "malformed: an answer has no 'rank'"),
        ("nectar", ("answers",), [{"answer": "x", "rank": 1}], "no pair: 1 answer to this prompt"),
        ("ultrafeedback", ("completions", 1, "response"), None, "empty: 'response' is null"),
        ("ultrafeedback", ("completions",), [{"fine-grained_score": 1}] * 4, "tie: all 4 answers have the same rank"),
        ("ultrafeedback", ("completions",), "x", "malformed: 'completions' is not a list of objects"),
        ("helpsteer2-preference", ("preference_strength",), 0, "tie: 'preference_strength' is 0"),
        ("helpsteer3", ("context",), 5, "malformed: 'context' is of type int, not text"),
        ("openai-preference", ("input",), {}, "malformed: no 'input.messages'"),
        ("openai-preference", ("preferred_output",), [], "empty: 'preferred_output' has no turns"),
        ("kto", ("label",), False, "undesirable: 'label' is false, and no stage learns from an answer that is only bad"),
        ("kto", ("label",), "yes", "malformed: 'label' is 'yes', not true or false"),
        ("alpaca", ("history",), ["x"], "malformed: 'history' is not a list of pairs of texts"),
        ("alpaca", ("output",), None, "no answer: 'output' is null"),
        ("sharegpt", ("conversations",), [], "empty: 'conversations' has no turns"),
        ("sharegpt", ("conversations",), "Hi!", "malformed: 'conversations' is of type str, not a list of turns"),
        (
            "sharegpt",
            ("conversations", 4),
            {"value": "So."},
            "malformed: turn 5 of 'conversations' is not an object with from and value as text",
        ),
        ("sharegpt", ("conversations", 4, "from"), "human", "no assistant turn: 'conversations' ends in a turn of role 'user'"),
        ("vicuna", ("prompt",), None, "empty: 'prompt' is null"),
        ("oasst", ("prompt",), "Hi!", "malformed: turn 1 of 'prompt' is not an object with role and text as text"),
        ("oasst", ("prompt", "replies"), [], "no answer: 'prompt' has no replies"),
        ("zhihu-kol", ("RESPONSE",), None, "no answer: 'RESPONSE' is null"),
        ("hc3", ("human_answers",), [], "no answer: 'human_answers' is empty"),
        ("hc3", ("human_answers",), "one", "malformed: no 'human_answers.0'"),
        ("mkqa-zh", ("answers", "zh_cn", 0, "text"), None, "no answer: 'answers.zh_cn.0.text' is null"),
        ("mkqa-ja", ("queries",), {"en": "who"}, "malformed: no 'queries.ja'"),
        ("qg-jaquad", ("sentence",), 1.5, "malformed: 'sentence' is of type float, not text"),
        ("qag-jaquad", ("questions",), [], "malformed: no 'questions.0'"),
    ],
)
def test_bad_rows_name_the_column(form: str, path: tuple[str | int, ...], value: Any, reason: str, tmp_path: Path) -> None:
    (result,) = results(form, [changed(form, path, value)], tmp_path)
    assert isinstance(result, Quarantined)
    assert result.reason == reason


def test_ranks_decide_which_reply_of_a_tree_is_followed(tmp_path: Path) -> None:
    (result,) = results("oasst", [changed("oasst", ("prompt", "replies", 1, "rank"), 2)], tmp_path)
    assert isinstance(result, Row)
    assert (result.prompt, result.chosen) == (({"role": "user", "content": "Hi!"},), "Go away.")


@pytest.mark.parametrize("form", ROWS)
def test_another_dataset_is_refused_by_its_missing_column(form: str, tmp_path: Path) -> None:
    column = DATASETS[form].columns[0]
    with pytest.raises(
        UserError, match=rf"no row of rows\.jsonl has a column '{column}'.*; its columns are 'x'.*another data\.sources\.0\.format"
    ):
        results(form, [{"x": 1}], tmp_path)
    good = ROWS[form][0]
    bad = {name: value for name, value in good.items() if name != column}
    assert [getattr(row, "reason", None) for row in results(form, [good, bad], tmp_path)] == [None, f"malformed: no column '{column}'"]


def test_a_named_dataset_takes_no_columns_and_a_weight_above_0() -> None:
    raw = yaml.safe_load((ROOT / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    place = {"path": "data/raw/shp/train.jsonl", "hub": None, "revision": None, "hub_split": None}
    named = {"name": "shp", "format": "shp", "split": NOTHING | {"reward": 1, "judge": 1}, "weight": 1, **place}
    raw["data"]["sources"].append(named)
    assert config.validate(raw, "params.yaml").data.sources[-1].kind == "pairs"
    for wrong, words in (
        ({"columns": {}}, "unknown key 'data.sources.4.columns'"),
        ({"weight": 0}, "data.sources.4.weight: Input should be greater than 0, got 0"),
        ({"split": NOTHING | {"text": 1}, "format": "mkqa"}, "data.sources.4: Input tag 'mkqa' found using 'format' does not match"),
        ({"split": NOTHING | {"reward": 1}, "format": "hc3"}, "rows of format hc3 (messages) cannot be used for split.reward"),
    ):
        raw["data"]["sources"][-1] = named | wrong
        with pytest.raises(UserError) as error:
            config.validate(raw, "params.yaml")
        assert words in error.value.what
