"""The schema of params.yaml: what it refuses, in which words, and that every preset passes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.collections import visit_collection

from rlhf import config
from rlhf.cli import reference
from rlhf.errors import UserError
from rlhf.workspace import dag
from rlhf.workspace.fingerprint import check_algorithm, read_graph

ROOT = Path(__file__).parents[2]
SANDBOX = yaml.safe_load((ROOT / "presets/sandbox.yaml").read_text(encoding="utf-8"))
HH = yaml.safe_load((ROOT / "presets/hh.yaml").read_text(encoding="utf-8"))


def with_value(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    raw = deepcopy(raw)
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    holder: Any = raw
    for part in parents:
        holder = holder[part]
    holder[last] = value
    return raw


def message(raw: object) -> str:
    with pytest.raises(UserError) as error:
        config.validate(raw, "params.yaml")
    return error.value.what


@pytest.mark.parametrize("preset", ["sandbox", "opt-1.3b", "llama-3.2-1b", "qwen2.5-0.5b"])
def test_preset_is_complete(preset: str) -> None:
    config.load(ROOT / "presets" / f"{preset}.yaml")


def test_prefect_can_look_through_params() -> None:
    seen: list[object] = []
    visit_collection(config.load(ROOT / "params.yaml"), seen.append, return_data=False)
    assert "assistant" in seen


def test_each_preset_is_a_line_of_models_of_its_own() -> None:
    raw = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "presets").glob("*.yaml")}
    names = {preset: values["promote"]["model"] for preset, values in raw.items()}
    assert names["sandbox"] == "assistant"
    assert len(set(names.values())) == len(names) == 8


def test_params_file_is_a_preset_that_passes() -> None:
    config.load(ROOT / "params.yaml")


def test_hh_lacks_its_file_only() -> None:
    assert message(HH) == "params.yaml: key 'data.sources.0.path' is missing"
    config.validate(with_value(HH, "data.sources.0.path", "data/raw/hh/pairs.jsonl"), "params.yaml")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ppo.steps", 0, "ppo.steps: Input should be greater than 0, got 0"),
        ("ppo.stepz", 5, "unknown key 'ppo.stepz'"),
        ("promote.min_win_rate", 1.5, "promote.min_win_rate: Input should be less than or equal to 1, got 1.5"),
        ("launch.accelerator", "tpu", "launch.accelerator: Input should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("base.kv_heads", 7, "must divide hidden_size"),
        ("ppo.mini_batch_size", 1000, "mini_batch_size (1000) must divide rollout_batch_size"),
        ("base.context_tokens", 60, "base.context_tokens is 60, but a stage uses sequences of"),
        ("data.sources.1.split.sft", 0, "every share of its split is 0"),
        ("data.sources.0.split.ppo", 1, "rows of format sandbox (text) cannot be used for split.ppo"),
        ("data.sources.1.name", "passages", "two sources are named 'passages'"),
        ("data.sources.2.split.heldout", 0, "evaluate needs held-out pairs"),
        ("data.sources.2.split.reward", 0, "reward needs preference pairs"),
        ("algorithm", "grop", "algorithm: Input should be 'ppo', 'dpo', 'rloo', 'grpo', 'dr-grpo', 'dapo', "),
        ("ppo.temperature", 1e-40, "ppo.temperature: Input should be greater than or equal to 0.001, got 1e-40"),
        ("awac.max_weight", 0.5, "awac.max_weight: Input should be greater than or equal to 1, got 0.5"),
        ("dpo.label_smoothing", 0.5, "dpo.label_smoothing: Input should be less than 0.5, got 0.5"),
        (
            "dpo",
            SANDBOX["dpo"] | {"loss": "ipo", "label_smoothing": 0.1},
            "dpo: label_smoothing is 0.1, but loss ipo has none: set it to 0",
        ),
        (
            "sft.lora",
            {"rank": 0, "alpha": 1, "targets": "all-linear", "learning_rate": 1},
            "sft.lora.rank: Input should be greater than 0, got 0",
        ),
    ],
)
def test_refusal_names_key_and_value(key: str, value: Any, words: str) -> None:
    assert words in message(with_value(SANDBOX, key, value))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"answers_per_prompt": 5}, "answers_per_prompt (5) must divide mini_batch_size (32)"),
        ({"answers_per_prompt": 1}, "baseline mean is made of several answers to a prompt, but answers_per_prompt is 1: 2 at least"),
        ({"answers_per_prompt": 1, "baseline": "greedy"}, "scale: group divides by the spread of the answers to a prompt"),
        ({"answers_per_prompt": 1, "baseline": "none", "scale": "batch", "resample_rounds": 1}, "one answer is always as good as itself"),
        ({"baseline": "none"}, "scale: group divides a distance from the prompt's other answers, but baseline is none"),
        ({"baseline": "length-weighted"}, "a rollout has 2 updates: set mini_batch_size to rollout_batch_size, and epochs to 1"),
        ({"overlong": {"buffer": 49, "factor": 1.0}}, "overlong.buffer (49) is longer than an answer"),
        ({"ratio": "sequence-mean", "normaliser": "tokens"}, "ratio sequence-mean is one number for a whole answer, which is then counted"),
        ({"ratio": "sequence-sum", "gamma": 0.9}, "with kl.where: token, or gamma below 1, each token has an advantage of its own"),
        ({"ratio": "sequence-token", "objective": "cispo"}, "cispo caps the ratio of each token, but ratio is sequence-token"),
        ({"objective": "cispo", "dual_clip": 3.0}, "cispo clips by ratio_cap alone: set dual_clip to null"),
        ({"ratio_cap": [0.0, 0.5]}, "ratio_cap [0.0, 0.5] leaves out 1"),
        ({"mismatch": {"correction": "tis", "low": 2.0, "high": 5.0}}, "mismatch: low 2 and high 5 leave out 1"),
        ({"kl.where": "none"}, "kl.coefficient is 0.04, but kl.where is none"),
        ({"kl.where": "answer"}, "in the reward only k1 has the gradient of the KL, k3 another one"),
        ({"kl.where": "token", "kl.estimator": "k1", "kl.with_ratio": True}, "kl.with_ratio is for kl.where: loss"),
        ({"kl.estimator": "k1"}, "as a loss k1 pulls nowhere, its gradient has mean 0"),
        ({"kl.where": "none", "kl.coefficient": 0.0, "reference_every": 5}, "reference_every moves what the policy is kept near to"),
        ({"kl.coefficient": 0.0, "reference_every": 5}, "but kl.where is loss, and β 0"),
        (
            {"reference_every": 5, "actor_lora": {"rank": 4, "alpha": 8.0, "targets": "all-linear", "learning_rate": 1e-3}},
            "reference_every: with actor_lora the reference is the model without adapters",
        ),
    ],
)
def test_what_training_without_a_critic_cannot_mean_is_refused(values: dict[str, Any], words: str) -> None:
    raw = SANDBOX
    for key, value in values.items():
        raw = with_value(raw, f"grpo.{key}", value)
    assert words in message(raw)


ULTHO = {"kl_weight": 0.0, "window": 10, "exploration": 1.0}


@pytest.mark.parametrize(
    ("section", "clusters", "words"),
    [
        (
            "ppo",
            {"steps": [30, 60]},
            "ultho.clusters.steps: nothing of that name is chosen here: policy_clip, value_clip",
        ),
        ("grpo", {"gae_lambda": [0.95, 1.0]}, "ultho.clusters.gae_lambda: nothing of that name is chosen here"),
        ("ppo", {"kl_coefficient": [0.2, 0.1]}, "ultho.clusters.kl_coefficient begins with 0.2, but the run with 0.1: put that first"),
        ("ppo", {"learning_rate_factor": [0.5, 1.0]}, "begins with 0.5, but the run with 1.0"),
        ("ppo", {"learning_rate_factor": [1.0, 0.0]}, "give factors above 0"),
        ("grpo", {"kl_coefficient": [0.04, 0.0]}, "a KL of weight 0 is not always measured"),
        ("ppo", {"epochs": [1, 1]}, "ultho.clusters.epochs has a value twice"),
        ("ppo", {"epochs": [1, 0.5]}, "ultho.clusters.epochs: 0.5 cannot stand here: Input should be a valid integer"),
        ("ppo", {"policy_clip": [[0.2, 0.2], [0.1, -0.2]]}, "(0.1, -0.2) cannot stand here: Input should be greater than 0"),
        ("ppo", {"epochs": [1]}, "List should have at least 2 items"),
        ("ppo", {}, "ppo.ultho.clusters: Dictionary should have at least 1 item"),
    ],
)
def test_values_that_no_bandit_can_choose_are_refused(section: str, clusters: dict[str, Any], words: str) -> None:
    assert words in message(with_value(SANDBOX, f"{section}.ultho", ULTHO | {"clusters": clusters}))


def test_a_kl_that_is_not_measured_cannot_count() -> None:
    raw = with_value(SANDBOX, "grpo.ultho", ULTHO | {"clusters": {"epochs": [1, 2]}, "kl_weight": 0.1})
    config.validate(raw, "params.yaml")
    raw = with_value(with_value(raw, "grpo.kl.where", "none"), "grpo.kl.coefficient", 0.0)
    assert "ultho.kl_weight: without a reference the KL is not measured" in message(raw)


def test_an_adaptive_controller_sets_the_coefficient_itself() -> None:
    raw = with_value(SANDBOX, "ppo.ultho", ULTHO | {"clusters": {"kl_coefficient": [0.1, 0.2]}})
    assert "an adaptive controller sets β itself" in message(with_value(raw, "ppo.kl.controller", "adaptive"))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_a_bandit_chose_is_a_table_of_its_own(tmp_path: Path, algorithm: str) -> None:
    raw = with_value(SANDBOX | {"algorithm": algorithm}, f"{algorithm}.ultho", ULTHO | {"clusters": {"epochs": [1, 2]}})
    (tmp_path / "dvc.yaml").write_text(dag.text(ROOT, config.validate(raw, "params.yaml")), encoding="utf-8")
    graph = read_graph(tmp_path)
    assert list(graph[algorithm].plots) == [f"plots/{algorithm}.csv", "plots/ultho.csv"]
    check_algorithm(graph, config.validate(raw, "params.yaml"))
    with pytest.raises(UserError, match=rf"{algorithm}\.ultho of params\.yaml is null, but dvc\.yaml says otherwise"):
        check_algorithm(graph, config.validate(SANDBOX | {"algorithm": algorithm}, "params.yaml"))


def test_a_warm_start_comes_before_answers_of_ones_own() -> None:
    raw = with_value(SANDBOX, "awac.versions", 2)
    assert config.validate(raw, "params.yaml").start == "models/awac"
    assert "awac.versions is 2, but algorithm dpo samples no answers for it to come before" in message(raw | {"algorithm": "dpo"})
    graph = read_graph(ROOT)
    check_algorithm(graph, config.validate(SANDBOX, "params.yaml"))
    with pytest.raises(UserError, match=r"dvc\.yaml has no stage awac, which awac\.versions: 2 of params.yaml asks for"):
        check_algorithm(graph, config.validate(raw, "params.yaml"))


def test_a_reference_that_moves_is_held_as_the_policy_is() -> None:
    raw = with_value(SANDBOX, "launch.engines.reference.zero_stage", 3)
    config.validate(raw, "params.yaml")
    assert "launch.engines must hold both with zero_stage 3, or neither" in message(with_value(raw, "grpo.reference_every", 5))


def test_missing_key_is_named() -> None:
    raw = deepcopy(SANDBOX)
    del raw["ppo"]["kl"]["target"]
    assert message(raw) == "params.yaml: key 'ppo.kl.target' is missing"


def test_stage_without_data_is_refused() -> None:
    raw = with_value(HH, "data.sources.0.path", "data/raw/hh/pairs.jsonl")
    assert "evaluate needs pairs for its judge" in message(with_value(raw, "data.sources.0.split.judge", 0))
    assert "sft needs demonstrations" in message(with_value(raw, "data.sources.0.split.sft", 0))


def test_hub_source_needs_a_revision() -> None:
    raw = with_value(with_value(HH, "data.sources.0.path", None), "data.sources.0.hub", "someone/pairs")
    assert "hub 'someone/pairs' needs a revision" in message(raw)
    assert "exactly one of path and hub" in message(with_value(HH, "data.sources.0.path", None))


@pytest.mark.parametrize(("text", "words"), [("seed: [1", "not valid YAML"), ("- 1", "params"), ("", "params")])
def test_file_that_is_no_params(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        config.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file .*rlhf use sandbox"):
        config.load(tmp_path / "params.yaml")


def test_stage_depends_on_its_own_sections_alone() -> None:
    assert dag.text(ROOT, config.validate(SANDBOX, "params.yaml")) == (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    for algorithm in config.ONE_OF_EACH:
        params = config.validate(SANDBOX | {"algorithm": algorithm}, "params.yaml")
        graph = yaml.safe_load(dag.text(ROOT, params))["stages"]
        assert tuple(graph) == params.stages
        for stage in params.stages:
            assert list(params.of_stage(stage)) == graph[stage]["params"]
    for preset in ("sandbox", "sandbox-function"):
        params = config.load(ROOT / f"presets/{preset}.yaml")
        params = config.validate(with_value(params.model_dump(mode="json"), "awac.versions", 1), "params.yaml")
        graph = yaml.safe_load(dag.text(ROOT, params))["stages"]
        assert tuple(graph) == params.stages
        assert list(params.of_stage("awac")) == graph["awac"]["params"]
        assert [stage for stage, entry in graph.items() if "models/awac" in entry["deps"]] == [params.policy]
        assert ("models/reward" in graph["awac"]["deps"]) == params.trains_reward


def test_dvc_lists_the_numbers_that_decide_and_the_flow_knows_all(tmp_path: Path) -> None:
    for algorithm in config.ONE_OF_EACH:
        params = config.validate(SANDBOX | {"algorithm": algorithm}, "params.yaml")
        (tmp_path / "dvc.yaml").write_text(dag.text(ROOT, params), encoding="utf-8")
        listed = yaml.safe_load((tmp_path / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        assert {stage: entry["metrics"] for stage, entry in listed.items() if "metrics" in entry} == {
            "evaluate": [{"metrics/summary.json": {"cache": False}}]
        }
        nodes = read_graph(tmp_path)
        assert all(f"metrics/{stage}.json" in nodes[stage].metrics for stage in params.stages)
        assert not any(path.startswith("metrics/") for node in nodes.values() for path in node.outputs)


def test_reference_is_current() -> None:
    assert (ROOT / "docs/params.md").read_text(encoding="utf-8") == reference.markdown(), "run `rlhf reference > docs/params.md`"


def test_reference_has_every_key() -> None:
    text = reference.markdown()

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()

    assert [key for key in keys(SANDBOX) | keys(HH) if f"| `{key}` |" not in text] == []
