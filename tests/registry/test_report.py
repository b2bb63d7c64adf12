"""The report: what comes first in it, what became worse, and what one version was made of that another was not."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config, registry
from rlhf.registry import changes, gates, remedies, report
from rlhf.registry.course import Course, Stage, duration
from rlhf.tracking import pictures

PROJECT = Path(__file__).parents[2]
PARAMS = config.load(PROJECT / "params.yaml")


def row(prompt: str, new: float, champion: float) -> dict[str, Any]:
    return {"prompt": prompt, "answers": {"new": f"{prompt} now", "champion": "before"}, "scores": {"new": new, "champion": champion}}


def test_what_failed_comes_first_with_what_to_do_and_the_worst_answers_are_ranked() -> None:
    version = registry.Version("assistant", 7, datetime.now(UTC), ("candidate",), {"algorithm": "ppo"})
    checked = [gates.Gate("max_kl", 1.0, 2.0, True, "fine"), gates.Gate("min_win_rate", 0.5, 0.7, False, "0.5, short of 0.7 by 0.2")]
    decision = registry.Decision(version, checked, 6, ["version 7 is candidate, champion is version 6; failed: min_win_rate"])
    worst = report.regressions([row("a", 0.5, 0.6), row("b", 1, 0), row("c", 0, 0.9), row("d", 1, 1), {}], "new", "champion")
    assert [found["prompt"] for found in worst] == ["c", "a"]
    found = changes.Changes([("ppo.steps", "30", "60")], ["data/raw/x.jsonl: new"], [])
    evidence = report.Evidence([], "", [], {"champion": worst, "sft": []}, found, {"gold_against_kl": b"png"}, [])
    hour = 3_600_000
    course = Course("ada@host, by hand", hour, 2 * hour, "http://flow", [Stage("ppo", True, hour, hour + 65_000, "http://ppo")])
    page = report.markdown(decision, evidence, course)
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "Gates that failed",
        "Go on",
        "This run",
        "What changed against the champion",
        "Worse than the champion: 2 worst answers",
        "Gates",
        "Measured on held-out data",
        "Course of the stages",
    ]
    assert "| min_win_rate | 0.5, short of 0.7 by 0.2 | It learned too little." in page
    assert '- `rlhf promote 7 --why "…"`' in page
    assert "- `rlhf use params.yaml promote.min_win_rate=… && rlhf run`" in page
    assert "| c | c now<br>(0.00) | before<br>(0.90) |\n| a |" in page
    assert "| ppo.steps | 30 | 60 |" in page
    assert "- data/raw/x.jsonl: new" in page
    assert "Code: none." in page
    assert "Started 1970-01-01 01:00 UTC by ada@host, by hand; it took 1 h 0 min." in page
    assert "| [ppo](http://ppo) | trained in this run | 1 min 5 s |" in page
    assert "<code>rlhf verify 7</code>" in report.html(page, "title")


def test_each_gate_has_a_remedy_whose_keys_exist() -> None:
    metrics: dict[str, Any] = {"gold": {"ci95": [0, 0]}, "reward_model": {"accuracy": 0, "ci95": [0, 0]}}
    metrics["win_rate"] = {"value": 0, "ci95": [0, 0], "length_controlled": {"ci95": [0, 0], "both_sides": 1}}
    metrics |= {"kl": 0, "perplexity": {"ratio": 0}, "eos_rate": {"ppo": 0}, "answer_tokens": {"ppo": 0}}
    metrics["accuracy"] = {"ppo": {"ci95": [0, 0]}, "difference": 0, "ci95": [0, 0]}
    every = PARAMS.promote.model_copy(update={"min_length_controlled_win_rate": 0.5})
    checked = gates.check(metrics, PARAMS.model_copy(update={"promote": every}), [gates.Pair("kind", 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)])
    assert {gate.name for gate in checked} == remedies.OF_GATES.keys()
    for algorithm in ("ppo", "grpo", "dpo"):
        for gate in checked:
            for key in remedies.remedy(gate.name, algorithm).split("`")[1::2]:
                value: Any = PARAMS
                for part in key.split("."):
                    value = getattr(value, part)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".gitignore").write_text("/models\n/mlruns\n/runs\n/data/answers.jsonl\n")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": {"cmd": "true", "deps": ["rlhf"], "outs": ["models/ppo"]}}}))
    for folder in ("models/ppo", "metrics", "data/raw/mine", "rlhf"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/answers.jsonl").write_text("{}\n")
    (tmp_path / "models/ppo/config.json").write_text("{}")
    (tmp_path / "metrics/evaluate.json").write_text(json.dumps({"kl": 1.0}))
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=user", "-c", "user.email=user@localhost", *words], cwd=root, check=True)


def make(root: Path, seed: int, code: str, part: str) -> registry.Version:
    (root / "params.yaml").write_text((PROJECT / "params.yaml").read_text().replace("seed: 1\n", f"seed: {seed}\n"))
    (root / "rlhf/losses.py").write_text(code)
    (root / f"data/raw/mine/{part}.dvc").write_text(yaml.safe_dump({"outs": [{"md5": "0123", "path": part}]}))
    (root / "models/ppo/model.safetensors").unlink(missing_ok=True)
    (root / "models/ppo/model.safetensors").write_text(str(seed))
    lock = {"ppo": {"outs": [{"path": "models/ppo", "md5": f"{seed}.dir"}]}}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", f"work of day {seed}")
    return registry.register(root, config.load(root / "params.yaml"))


def test_what_changed_between_two_versions_is_named(root: Path) -> None:
    first = make(root, 1, "one\n", "a.jsonl")
    second = make(root, 2, "one\ntwo\n", "b.jsonl")
    found = changes.between(first, second, root)
    assert found.params == [("seed", "1", "2")]
    assert found.data == ["data/raw/mine/b.jsonl: new"]
    assert found.code[0] == "rlhf/losses.py: +1 −0"
    assert found.code[1].startswith("commit ")
    assert found.code[1].endswith(" work of day 2")
    assert changes.between(second, second, root) == changes.Changes([], [], [])


def test_what_decides_is_drawn_first_and_noise_is_smoothed(tmp_path: Path) -> None:
    columns = ["step", "loss", "entropy", "accuracy", "heldout_accuracy"]
    assert pictures.panels(columns, "step") == ["accuracy", "loss", "entropy"]
    assert pictures.panels(["step", "kl", "gold", "reward_model"], "kl") == ["gold", "reward_model"]
    assert pictures.smooth([2.0] * 40) == pytest.approx([2.0] * 40)
    noise = pictures.smooth([0.0, 1.0] * 40)
    assert max(noise) - min(noise) < 0.2
    rows = [f"{step},{step % 2},{0.1},{step % 3},{0.5 if step % 10 == 0 else ''}" for step in range(1, 41)]
    (tmp_path / "reward.csv").write_text("\n".join([",".join(columns), *rows]) + "\n")
    pictures.draw(tmp_path / "reward.csv", {"x": "step", "y": "accuracy"})
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_durations_read_well() -> None:
    assert [duration(1000 * seconds) for seconds in (7, 65, 7500)] == ["7 s", "1 min 5 s", "2 h 5 min"]
