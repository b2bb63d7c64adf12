"""A params.yaml of an earlier version of the project is made whole, and nothing of its own is lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from rlhf import config
from rlhf.errors import UserError
from rlhf.workspace import presets

ROOT = Path(__file__).parents[2]
CHANGED = ["seed=7", "ppo.steps=3", "promote.model=mine", "rewards.1={name: short, kind: function, function: length, weight: 0.1}"]
WITHIN = ["sources: null", "right_from: null", "seconds: 5.0", "failure_score: 0.0", "max_failed_share: 0.1", "options: {most: 9}"]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for folder in ("presets", "graphs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    presets.use(tmp_path, "sandbox", [value.replace("weight: 0.1}", f"weight: 0.1, {', '.join(WITHIN)}}}") for value in CHANGED])
    return tmp_path


def earlier(root: Path) -> str:
    """Take out what an earlier version had not, and put in what it had; gives the text of before."""
    path = root / "params.yaml"
    whole = path.read_text(encoding="utf-8")
    text = re.sub(r"^awac:\n(?: .*\n)+", "", whole, flags=re.MULTILINE)  # a section
    text = re.sub(r"^  ultho:\n", "", text, flags=re.MULTILINE)  # a key of two sections
    text = re.sub(r"^    grpo: \{processes.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^    kinds:\n", "", text, count=1, flags=re.MULTILINE)  # of an entry of a list
    text = re.sub(
        r"^  checkpoint_every: (\d+)\n\nreward:", r"  checkpoint_every: \1\n  warm_up: 3 # mine\n\nreward:", text, flags=re.MULTILINE
    )
    assert len(whole.splitlines()) - len(text.splitlines()) > 20
    path.write_text(text, encoding="utf-8")
    return whole


def test_what_it_lacks_comes_from_a_preset_and_what_it_has_stays(workspace: Path) -> None:
    whole = earlier(workspace)
    with pytest.raises(UserError, match=r"key 'awac' is missing.*`rlhf use \S+ --fill PRESET`"):
        config.load(workspace / "params.yaml")
    with pytest.raises(UserError, match=r"key 'awac' is missing.* add `--fill PRESET`"):
        presets.use(workspace, str(workspace / "params.yaml"), [])
    said = presets.use(workspace, str(workspace / "params.yaml"), ["grpo.steps=5"], fill="sandbox")
    assert "sft.warm_up 3: known no more, taken out" in said
    assert "ppo.ultho null: from the preset" in said
    assert any(line.startswith('awac {"versions": 0, ') for line in said)
    assert "data.sources.0.kinds null: from the preset" in said
    filled = (workspace / "params.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(filled) == yaml.safe_load(whole) | {"grpo": yaml.safe_load(whole)["grpo"] | {"steps": 5}}
    # in the order of the preset, so that a comparison shows what is new
    assert list(yaml.safe_load(filled)) == list(yaml.safe_load(whole))
    assert len(filled.splitlines()) == len(whole.splitlines())
    params = config.load(workspace / "params.yaml")
    assert (params.seed, params.ppo.steps, params.promote.model, params.rewards[1].name) == (7, 3, "mine", "short")
    assert not any("preset" in line or "no more" in line for line in presets.use(workspace, "params.yaml", [], fill="sandbox")[:-1])


def test_what_no_preset_has_is_asked_for_and_nothing_is_written(workspace: Path) -> None:
    path = workspace / "params.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("failure_score: 0.0", ""), encoding="utf-8")
    earlier(workspace)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"^\S+: key 'rewards\.1\.failure_score' is missing \(") as caught:
        presets.use(workspace, str(path), [], fill="sandbox")
    assert "--fill" not in str(caught.value.remedy)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="unknown preset 'sandbax': did you mean 'sandbox'"):
        presets.use(workspace, str(path), [], fill="sandbax")


def test_sections_that_are_one_by_an_anchor_are_not_filled(workspace: Path) -> None:
    path = workspace / "params.yaml"
    text = path.read_text(encoding="utf-8").replace("\nsft:\n", "\nsft: &both\n")
    path.write_text(re.sub(r"^dpo:\n(?: .*\n)+", "dpo: *both\n", text, flags=re.MULTILINE), encoding="utf-8")
    with pytest.raises(UserError, match="dpo is sft by an anchor of YAML"):
        presets.use(workspace, str(path), [], fill="sandbox")
