"""What stands in params.yaml and dvc.yaml is what is read, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf import config
from rlhf.config.text import parse
from rlhf.errors import UserError
from rlhf.workspace import fingerprint, presets
from tests.workspace.test_presets import ROOT

SANDBOX = (ROOT / "presets/sandbox.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 0.002),
        ("1_000", 1000),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-0b11", -3),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("True", True),
        ("2026-01-01", "2026-01-01"),
        ("-.inf", float("-inf")),
        ("", None),
        ("~", None),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse(f"a: {text}", "x") == {"a": value}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\na: 2", "key 'a' stands there twice"),
        ("a: 1\n<<: {b: 2}", "maps are not merged here"),
        ("a: 1\n\u2028b: 2", "line 2: not valid YAML: U\\+2028 ends a line for some readers"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!int x", "invalid literal"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_what_has_no_plain_meaning_is_refused(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse(text, "x")


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("seed: 1\n", "seed: 1\nseed: 2\n", "key 'seed' stands there twice"),
        ("seed: 1\n", "seed: true\n", "seed: Input should be a valid integer, got True"),
        ("seed: 1\n", "seed: '1'\n", "seed: Input should be a valid integer, got '1'"),
        ("learning_rate: 2.0e-3", "learning_rate: yes", "base.optimizer.learning_rate: Input should be a valid number, got 'yes'"),
        ("no_eos_reward: -2.0", "no_eos_reward: .nan", "ppo.no_eos_reward: Input should be a finite number, got nan"),
        ("max_kl: 20.0", "max_kl: .inf", "promote.max_kl: Input should be a finite number, got inf"),
        ("reference: {zero_stage: 0", "reference: {zero_stage: false", "reference.zero_stage: Input should be 0 or 3, got False"),
        ("gradient_checkpointing: false", "gradient_checkpointing: 0", "gradient_checkpointing: Input should be a valid boolean, got 0"),
    ],
)
def test_a_slip_is_refused_and_no_value_is_changed_for_another(tmp_path: Path, before: str, after: str, why: str) -> None:
    assert before in SANDBOX
    (tmp_path / "params.yaml").write_text(SANDBOX.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        config.load(tmp_path / "params.yaml")
    assert why in refused.value.what


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ("{sft: {deps: abc}}", "deps of stage sft has 'abc', and is to be a list of paths"),
        ("{sft: {outs: [{}]}}", "outs of stage sft has {}"),
        ("{sft: {outs: [1]}}", "outs of stage sft has 1"),
        ("{sft: {plots: [{a: x}]}}", "plots of stage sft has {'a': 'x'}"),
        ("{sft: [a]}", "stage 'sft' is no map of values"),
        ("[sft]", "it has none"),
    ],
)
def test_a_graph_of_another_form_is_refused(tmp_path: Path, stages: str, why: str) -> None:
    (tmp_path / "dvc.yaml").write_text(f"stages: {stages}\n", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        fingerprint.read_graph(tmp_path)
    assert why in refused.value.what


@pytest.mark.parametrize("value", ["2026-01-01", "&a [*a]", "!!int x"])
def test_any_value_may_be_asked_for(tmp_path: Path, value: str) -> None:
    (tmp_path / "mine.yaml").write_text(SANDBOX, encoding="utf-8")
    with pytest.raises(UserError, match="seed: "):
        presets.use(tmp_path, str(tmp_path / "mine.yaml"), [f"seed={value}"])
