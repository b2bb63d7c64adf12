"""`rlhf use`: presets, overrides, and files brought into the workspace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from rlhf import config
from rlhf.config import algorithms
from rlhf.config.data import SandboxSource
from rlhf.config.rewards import FunctionReward
from rlhf.config.training import BuiltBase
from rlhf.errors import UserError
from rlhf.workspace import presets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "workspace"
    for folder in ("presets", "graphs"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "dvc.yaml", root)
    monkeypatch.chdir(root)
    return root


def pairs(path: Path, text: str = '{"chosen": "a", "rejected": "b"}\n') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_preset_as_it_is_keeps_its_comments(workspace: Path) -> None:
    presets.use(workspace, "sandbox", [])
    assert (workspace / "params.yaml").read_bytes() == (ROOT / "presets/sandbox.yaml").read_bytes()


def test_overrides_reach_nested_keys_lists_and_sections(workspace: Path) -> None:
    values = [
        "seed=7",
        "ppo.kl.coefficient=1e-2",
        "data.sources.2.label_noise=0.2",
        "launch.hostfile=null",
        "base.optimizer.betas=[0.8, 0.9]",
    ]
    presets.use(workspace, "sandbox", values)
    params = config.load(workspace / "params.yaml")
    assert (params.seed, params.ppo.kl.coefficient, params.launch.hostfile) == (7, 0.01, None)
    source = params.data.sources[2]
    assert isinstance(source, SandboxSource)
    assert source.label_noise == 0.2
    assert isinstance(params.base, BuiltBase)
    assert params.base.optimizer.betas == (0.8, 0.9)
    assert params.sft == config.load(ROOT / "presets/sandbox.yaml").sft


def test_options_of_a_list_entry_are_set_key_by_key(workspace: Path) -> None:
    values = ["rewards.0.options.how=exact", "rewards.1.options.most=12", "rewards.1.options.limits.low=3", "rewards.1.weight=0.25"]
    presets.use(workspace, "sandbox-function", values)
    first, second = config.load(workspace / "params.yaml").rewards
    assert isinstance(first, FunctionReward)
    assert isinstance(second, FunctionReward)
    assert (first.options, second.options, second.weight) == ({"how": "exact"}, {"most": 12, "over": 16, "limits": {"low": 3}}, 0.25)
    with pytest.raises(UserError, match=r"unknown key 'rewards.0.option.how': did you mean 'options'\?"):
        presets.use(workspace, "sandbox-function", ["rewards.0.option.how=exact"])
    with pytest.raises(UserError, match=r"unknown key 'rewards.0.options.how.x': rewards.0.options.how is not a section"):
        presets.use(workspace, "sandbox-function", ["rewards.0.options.how.x=1"])


def test_params_file_itself_is_a_preset(workspace: Path) -> None:
    presets.use(workspace, "sandbox", ["seed=7"])
    presets.use(workspace, "params.yaml", ["ppo.steps=3"])
    params = config.load(workspace / "params.yaml")
    assert (params.seed, params.ppo.steps) == (7, 3)


OWN = """\
# what we train on Mondays
ppo:
    # as long as the budget lasts
    steps: 30   # was 20
    kl: {coefficient: 0.1, controller: "fixed"}
    policy_clip: [0.2, 0.2]

    dual_clip: null
data:
    sources:
        - name: mine
          columns: {prompt: null}

# nothing below
seed: 1
"""


@pytest.mark.parametrize("preset", presets.names(ROOT))
def test_presets_have_the_layout_that_dvc_writes(tmp_path: Path, preset: str) -> None:
    path = Path(shutil.copy(ROOT / f"presets/{preset}.yaml", tmp_path))
    before = path.read_text(encoding="utf-8").splitlines()
    apply_overrides(path, ["ppo.steps=5"])
    after = path.read_text(encoding="utf-8").splitlines()
    assert [line for line, old in zip(after, before, strict=True) if line != old] == ["  steps: 5"]


@pytest.mark.parametrize(
    ("value", "old", "new", "said"),
    [
        ("ppo.steps=5", "steps: 30   #", "steps: 5    #", "ppo.steps 30 → 5"),
        ("ppo.kl.coefficient=1.0e-2", "coefficient: 0.1", "coefficient: 1.0e-2", "ppo.kl.coefficient 0.1 → 0.01"),
        ("ppo.policy_clip=[0.1, 0.3]", "[0.2, 0.2]", "[0.1, 0.3]", "ppo.policy_clip [0.2, 0.2] → [0.1, 0.3]"),
        ("ppo.dual_clip=3.0", "dual_clip: null", "dual_clip: 3.0", "ppo.dual_clip null → 3.0"),
        ("ppo.steps=null", "steps: 30   #", "steps: null #", "ppo.steps 30 → null"),
        ("data.sources.0.columns.prompt=text", "prompt: null", "prompt: text", "data.sources.0.columns.prompt null → text"),
        ("data.sources.0.path=a b", "          columns", "          path: a b\n          columns", "data.sources.0.path null → a b"),
    ],
)
def test_change_leaves_the_rest_of_a_file_as_it_is(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, value: str, old: str, new: str, said: str
) -> None:
    (workspace / "params.yaml").write_text(OWN, encoding="utf-8")
    whole = config.load(ROOT / "params.yaml")
    monkeypatch.setattr(config, "validate", lambda *_: whole)  # a short file shows the layout better
    done = presets.use(workspace, "params.yaml", [value])
    assert (workspace / "params.yaml").read_text(encoding="utf-8") == OWN.replace(old, new, 1)
    assert said in done


def test_section_that_was_null_is_written_in_lines_of_its_own(workspace: Path) -> None:
    presets.use(workspace, "sandbox", ["sft.lora={rank: 8, alpha: 16, targets: [q_proj, v_proj], learning_rate: 1.0e-4}"])
    assert "  lora:\n    rank: 8\n    alpha: 16\n    targets:\n    - q_proj\n" in (workspace / "params.yaml").read_text(encoding="utf-8")
    presets.use(workspace, "params.yaml", ["sft.lora=null"])
    assert (workspace / "params.yaml").read_bytes() == (ROOT / "presets/sandbox.yaml").read_bytes()


@pytest.mark.parametrize(
    ("preset", "value", "words"),
    [
        ("sandbx", "seed=1", r"unknown preset 'sandbx': did you mean 'sandbox'\?.*hh, .*qwen2.5-0.5b"),
        ("missing.yaml", "seed=1", "unknown preset 'missing.yaml'"),
        ("sandbox", "seed", "'seed' is not of the form section.key=value"),
        ("sandbox", "ppo.klr.target=1", r"unknown key 'ppo.klr.target': did you mean 'kl'\?"),
        ("sandbox", "pop.steps=1", r"unknown key 'pop.steps': did you mean 'ppo'\?"),
        ("sandbox", "data.sources.4.rows=1", "data.sources has 4 entries.*from 0 to 3"),
        ("sandbox", "data.sources.first.rows=1", "data.sources has 4 entries"),
        ("sandbox", "seed.a=1", "unknown key 'seed.a': seed is not a section"),
        ("sandbox", "ppo.steps=many", "ppo.steps: .*, got 'many'"),
        ("hh", "seed=1", "presets/hh.yaml: key 'data.sources.0.path' is missing.*rlhf use hh KEY=VALUE"),
        ("hh", "data.sources.0.path=nowhere.jsonl", "data.sources.0.path: no such file: 'nowhere.jsonl'"),
    ],
)
def test_refusal_leaves_params_alone(workspace: Path, preset: str, value: str, words: str) -> None:
    presets.use(workspace, "sandbox", [])
    before = (workspace / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=words):
        presets.use(workspace, preset, [value])
    assert (workspace / "params.yaml").read_bytes() == before


def test_file_from_elsewhere_is_copied_once(workspace: Path, tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl")
    first = presets.use(workspace, "hh", ["data.sources.0.path=../pairs.jsonl"])
    copy = workspace / "data/raw/hh/pairs.jsonl"
    assert copy.read_bytes() == file.read_bytes()
    assert yaml.safe_load((workspace / "params.yaml").read_text())["data"]["sources"][0]["path"] == "data/raw/hh/pairs.jsonl"
    assert first == [
        "data.sources.0.path null → ../pairs.jsonl",
        "copied ../pairs.jsonl to data/raw/hh/pairs.jsonl",
        "data/raw/hh is not versioned: this folder is no DVC repository (`dvc init`)",
        "wrote params.yaml from presets/hh.yaml",
    ]
    number = copy.stat().st_ino
    presets.use(workspace, "hh", [f"data.sources.0.path={file}"])
    assert copy.stat().st_ino == number


def test_changed_file_replaces_the_copy_without_writing_through_it(workspace: Path, tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl")
    presets.use(workspace, "hh", [f"data.sources.0.path={file}"])
    linked = tmp_path / "cache"
    os.link(workspace / "data/raw/hh/pairs.jsonl", linked)
    old = linked.read_bytes()
    pairs(file, '{"chosen": "c", "rejected": "d"}\n')
    presets.use(workspace, "hh", [f"data.sources.0.path={file}"])
    assert (workspace / "data/raw/hh/pairs.jsonl").read_bytes() == file.read_bytes()
    assert linked.read_bytes() == old


def test_folder_is_copied_whole(workspace: Path, tmp_path: Path) -> None:
    pairs(tmp_path / "saved/part/one.jsonl")
    presets.use(workspace, "hh", ["data.sources.0.path=../saved"])
    pairs(tmp_path / "saved/part/two.jsonl")
    presets.use(workspace, "hh", ["data.sources.0.path=../saved"])
    assert sorted(path.name for path in (workspace / "data/raw/hh/saved").rglob("*.jsonl")) == ["one.jsonl", "two.jsonl"]
    assert [path.name for path in (workspace / "data/raw/hh").iterdir()] == ["saved"]


def test_file_in_the_workspace_stays_where_it_is(workspace: Path) -> None:
    pairs(workspace / "data/raw/mine/pairs.jsonl")
    presets.use(workspace, "hh", ["data.sources.0.path=data/raw/mine/pairs.jsonl"])
    assert yaml.safe_load((workspace / "params.yaml").read_text())["data"]["sources"][0]["path"] == "data/raw/mine/pairs.jsonl"
    assert not (workspace / "data/raw/hh").exists()


def test_folder_of_several_sources_is_versioned_once(workspace: Path) -> None:
    sources = yaml.safe_load((workspace / "presets/smollm2-135m-checkable.yaml").read_text())["data"]["sources"]
    for source in sources:
        pairs(workspace / source["path"])
    done = presets.use(workspace, "smollm2-135m-checkable", [])
    assert len(sources) == 8
    assert done.count("data/raw/tasks is not versioned: this folder is no DVC repository (`dvc init`)") == 1


def test_new_data_is_versioned_and_makes_prepare_stale(workspace: Path, tmp_path: Path) -> None:
    def dvc(*arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("dvc")), *arguments]
        environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=True).stdout

    pairs(workspace / "data/raw/README.md", "tracked by git\n")
    stage = {"cmd": "ls data/raw/hh > out", "deps": ["data/raw"], "outs": ["out"]}
    (workspace / "graphs/common.yaml").write_text(yaml.safe_dump({"stages": {"prepare": stage}}), encoding="utf-8")
    for part in ("reward", "ppo"):
        (workspace / f"graphs/{part}.yaml").write_text("", encoding="utf-8")
    dvc("init", "--no-scm", "--quiet")
    file = pairs(tmp_path / "pairs.jsonl")
    done = presets.use(workspace, "hh", ["data.sources.0.path=../pairs.jsonl"])
    assert "versioned data/raw/hh with DVC: commit data/raw/hh.dvc" in done
    dvc("repro", "--quiet")
    assert "up to date" in dvc("status")
    presets.use(workspace, "hh", ["data.sources.0.path=../pairs.jsonl"])
    assert "up to date" in dvc("status")
    pairs(file, '{"chosen": "c", "rejected": "d"}\n')
    presets.use(workspace, "hh", ["data.sources.0.path=../pairs.jsonl"])
    assert "prepare" in dvc("status")


# ------------------------------------------------------------------------------------------------------ names of algorithms


@pytest.mark.parametrize("name", algorithms.VALUES)
def test_an_algorithms_name_writes_its_values(workspace: Path, name: str) -> None:
    done = presets.use(workspace, "sandbox", [f"algorithm={name}"])
    params = config.load(workspace / "params.yaml")
    assert (params.algorithm, params.policy) == (name, "grpo")
    assert f"wrote dvc.yaml for algorithm {name}" in done
    for key, value in algorithms.values(name, params.grpo.model_dump()).items():
        found: Any = params.grpo.model_dump(mode="json")
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    # what stays as it was is not told, and the file keeps the layout that DVC writes
    assert all(before != after for line in done if " → " in line for before, _, after in [line.partition(" ")[2].partition(" → ")])
    before = (workspace / "params.yaml").read_text(encoding="utf-8")
    apply_overrides(workspace / "params.yaml", ["ppo.steps=5"])
    assert sum(a != b for a, b in zip(before.split("\n"), (workspace / "params.yaml").read_text().split("\n"), strict=True)) == 1


def test_what_comes_after_a_name_goes_first(workspace: Path) -> None:
    done = presets.use(workspace, "sandbox", ["grpo.steps=7", "grpo.kl.coefficient=0.5", "algorithm=rloo", "grpo.answers_per_prompt=2"])
    params = config.load(workspace / "params.yaml")
    # the name stands for the KL and for the number of answers, not for the steps
    assert (params.grpo.steps, params.grpo.kl.coefficient, params.grpo.answers_per_prompt) == (7, 0.03, 2)
    assert "grpo.baseline mean → leave-one-out" in done
    again = presets.use(workspace, "params.yaml", ["algorithm=ppo"])
    assert again[:2] == ["algorithm rloo → ppo", "wrote dvc.yaml for algorithm ppo"]
    assert config.load(workspace / "params.yaml").grpo == params.grpo
    assert (workspace / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()


def test_the_table_of_names_is_the_schemas() -> None:
    assert ("ppo", "dpo", *algorithms.VALUES, "best-of-n", "rrhf", "iterative") == algorithms.NAMES
    assert {algorithms.policy_stage(name) for name in algorithms.NAMES} == config.STAGES_OF.keys()
