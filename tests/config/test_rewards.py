"""Section rewards: what the schema refuses, and what dvc.yaml lists for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config
from rlhf.errors import UserError
from rlhf.workspace import dag, fingerprint

ROOT = Path(__file__).parents[2]
SANDBOX = yaml.safe_load((ROOT / "presets/sandbox.yaml").read_text(encoding="utf-8"))
MODEL: dict[str, Any] = {"name": "model", "kind": "model", "weight": 1.0}
LIMITS = {"weight": 1.0, "sources": None, "right_from": None, "seconds": 5.0, "failure_score": 0.0, "max_failed_share": 0.1}
FUNCTION: dict[str, Any] = {"name": "mine", "kind": "function", "function": "rewards/my.py:score", "options": {}, **LIMITS}
SERVICE: dict[str, Any] = {"name": "served", "kind": "http", "url": "http://judge:8000/score", "batch_size": 32, "retries": 3, **LIMITS}


def params(*rewards: dict[str, Any], **changes: Any) -> config.Params:
    raw = copy.deepcopy(SANDBOX) | {"rewards": list(rewards)}
    return config.validate(raw | changes, "params.yaml")


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([], "rewards: List should have at least 1 item"),
        ([FUNCTION], "rewards: ppo needs an entry of kind model, as its critic begins as the reward model"),
        ([MODEL, MODEL | {"name": "other"}], "entries model and other are of kind model, but stage reward trains one"),
        ([MODEL, FUNCTION, FUNCTION], "two entries are named 'mine'"),
        ([MODEL | {"weight": 0.0}, FUNCTION | {"weight": 0.0}], "every weight is 0"),
        ([MODEL, FUNCTION | {"sources": ["prompts"]}], "entry 'mine' names source 'prompts', which is none of kind verifiable"),
        ([MODEL, FUNCTION | {"sources": []}], "entry 'mine': sources is empty"),
        ([MODEL, FUNCTION | {"right_from": 0.0}], "failure_score 0 is not below right_from 0"),
        ([MODEL, FUNCTION | {"function": "maths"}], "give FILE.py:NAME"),
        ([MODEL, FUNCTION | {"function": "../my.py:score"}], "give FILE.py:NAME"),
        ([MODEL, FUNCTION | {"function": "/my.py:score"}], "give FILE.py:NAME"),
        ([MODEL, FUNCTION | {"seconds": 0.0}], "rewards.1.function.seconds|rewards.1.seconds"),
        ([MODEL, SERVICE | {"url": "ftp://judge"}], "it is to begin with http:// or https://"),
        ([MODEL, SERVICE | {"url": "http://me:secret@judge/"}], "url holds a password"),
        ([MODEL, {"name": "x", "kind": "oracle"}], "Input tag 'oracle' found using 'kind'"),
    ],
)
def test_the_schema_refuses_with_the_reason(rewards: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError) as error:
        params(*rewards)
    assert any(word in error.value.what for word in words.split("|"))
    assert "secret" not in error.value.what


def test_rewards_of_every_kind_are_read() -> None:
    found = params(MODEL, FUNCTION, SERVICE)
    assert [entry.kind for entry in found.rewards] == ["model", "function", "http"]
    assert found.reward_files == ["rewards/my.py"]


def test_the_file_of_a_function_is_an_input_of_the_stages_that_call_it(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(dag.text(ROOT, params(MODEL, FUNCTION)), encoding="utf-8")
    graph = fingerprint.read_graph(tmp_path)
    assert [name for name, node in graph.items() if "rewards/my.py" in node.inputs] == ["ppo", "evaluate"]
    fingerprint.check_algorithm(graph, params(MODEL, FUNCTION))
    with pytest.raises(UserError, match=r"lacks input other\.py of stage ppo, input other\.py of stage evaluate"):
        fingerprint.check_algorithm(graph, params(MODEL, FUNCTION | {"function": "other.py:score"}))


def test_a_graph_without_a_reward_model_is_refused_where_one_is_asked_for() -> None:
    graph = fingerprint.read_graph(ROOT)
    without = {name: node for name, node in graph.items() if name != "reward"}
    with pytest.raises(UserError, match="lacks stage reward"):
        fingerprint.check_algorithm(without, params(MODEL))


def test_without_a_model_there_is_no_stage_reward_and_nothing_reads_one(tmp_path: Path) -> None:
    given = config.load(ROOT / "presets/sandbox-function.yaml")
    assert not any(source.kind == "pairs" for source in given.data.sources)
    text = dag.text(ROOT, given)
    assert "models/reward" not in text
    assert "plots/reward.csv" not in text
    graph = yaml.safe_load(text)["stages"]
    assert tuple(graph) == given.stages == ("prepare", "base", "sft", "grpo", "evaluate")
    for stage in given.stages:
        assert list(given.of_stage(stage)) == graph[stage]["params"]
    (tmp_path / "dvc.yaml").write_text(dag.text(ROOT, params(MODEL, algorithm="grpo")), encoding="utf-8")
    with pytest.raises(UserError, match=r"dvc\.yaml has stage reward"):
        fingerprint.check_algorithm(fingerprint.read_graph(tmp_path), given)


def test_a_run_without_gold_score_and_pairs_needs_something_that_tells_right_from_wrong() -> None:
    raw = yaml.safe_load((ROOT / "presets/sandbox-function.yaml").read_text(encoding="utf-8"))
    raw["data"]["sources"][2] |= {"format": "gsm8k", "path": "data/raw/g.jsonl", "hub": None, "revision": None, "hub_split": None}
    for key in ("kind", "kinds", "rows", "label_noise"):
        del raw["data"]["sources"][2][key]
    assert not config.validate(raw, "params.yaml").trains_judge
    raw["rewards"][0]["right_from"] = None
    with pytest.raises(UserError, match="evaluate has nothing to judge by: give an entry right_from"):
        config.validate(raw, "params.yaml")
