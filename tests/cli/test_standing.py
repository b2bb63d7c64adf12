"""Whom `rlhf chat` talks to, and what `rlhf status` begins with, in a workspace whose versions come and go from service."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config, plan, registry
from rlhf.cli import main as cli
from rlhf.cli import standing
from rlhf.models.saving import save_model
from rlhf.plan.findings import Findings

PROJECT = Path(__file__).parents[2]
EVALUATION = {
    "gold": {"sft": 0.4, "ppo": 0.7, "difference": 0.3, "ci95": [0.25, 0.35]},
    "win_rate": {"value": 0.8, "ci95": [0.76, 0.84], "judge": "gold"},
    "reward_model": {"accuracy": 0.8, "n": 500, "sft": 0.1, "ppo": 0.9, "ci95": [0.7, 0.9]},
    "kl": 12.0,
    "perplexity": {"sft": 10.0, "ppo": 10.5, "ratio": 1.05},
    "eos_rate": {"sft": 0.95, "ppo": 0.99},
    "answer_tokens": {"sft": 20.0, "ppo": 22.0},
}


@pytest.fixture
def root(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a trained model and its evaluation, before anything is registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": {"cmd": "true", "outs": ["models/ppo"]}}}), encoding="utf-8")
    lock = {"ppo": {"cmd": "true", "outs": [{"path": "models/ppo", "md5": "0123.dir"}]}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}), encoding="utf-8")
    save_model(llama, tokenizer, tmp_path / "models/ppo")
    for folder in ("metrics", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "models/ppo/lineage.json").write_text(json.dumps({"fingerprint": "f00d"}), encoding="utf-8")
    (tmp_path / "data/answers.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "metrics/evaluate.json").write_text(json.dumps(EVALUATION), encoding="utf-8")
    subprocess.run(
        [Path(sys.executable).with_name("dvc"), "init", "--no-scm", "-q"], env=os.environ | {"DVC_NO_ANALYTICS": "1"}, check=True
    )
    return tmp_path


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: str, questions: str = "hello\n") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
        try:
            cli.main()
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
        return code, *capsys.readouterr()

    return command


def test_chat_talks_to_the_champion_or_else_the_candidate_and_says_so(root: Path, rlhf: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = rlhf("chat")
    assert (code, out) == (1, "")
    assert "assistant: no version is champion or candidate yet — `rlhf run` trains and registers one" in err
    assert rlhf("status")[1].startswith("champion of assistant: none\nno version is registered yet: `rlhf run` registers one\n")

    params = config.load(root / "params.yaml")
    verdict = registry.check(registry.register(root, params), root, params)
    decision = registry.carry_out(verdict, root, params, by="test", why="test")
    code, out, err = rlhf("chat", "--max-tokens", "4")
    assert (code, out.strip() != "") == (0, True)
    assert err == "assistant version 1 (candidate; gates failed: min_reward_accuracy): no version is champion\n"
    for name in ("1", "candidate", "models:/assistant/1"):
        assert rlhf("chat", "--max-tokens", "4", "--model", name)[:2] == (code, out)
    assert "7" in rlhf("chat", "--model", "7")[2]
    said = rlhf("status")[1].splitlines()
    assert said[:3] == [
        "champion of assistant: none",
        "candidate: version 1",
        "last version: 1, gates failed: min_reward_accuracy",
    ]
    failed = "FAIL min_reward_accuracy: reward model's accuracy: 0.8, short of 0.85 by 0.05"
    assert said[3] == f"  {failed}"
    assert len([line for line in said if line.startswith((" gold.", " win_rate.", " kl", " eos_rate"))]) == 6
    assert any(line.startswith(" win_rate.judge") for line in rlhf("status", "--all")[1].splitlines())
    advice = "\n".join(standing.after_run({"version": 1, "champion": decision.champion, "failed": [failed]}))
    assert advice.startswith(f"\nnothing was promoted: no version is in service\n  {failed}\n")
    assert "rlhf chat --model 1 " in advice
    assert "rlhf promote 1 --why" in advice

    assert rlhf("promote", "1")[0] == 0
    assert rlhf("chat", "--max-tokens", "4")[2] == "assistant version 1 (champion; gates failed: min_reward_accuracy)\n"
    assert rlhf("status")[1].startswith("champion of assistant: version 1, promoted at ")
    assert list(standing.after_run({"version": 1, "champion": 1, "failed": [failed]})) == []


def test_the_check_of_the_plan_looks_at_the_champion(root: Path) -> None:
    params = config.load(root / "params.yaml")
    version = registry.register(root, params)
    registry.promote(version, None, root, params, by="test", why="test")
    found = Findings()
    plan.check_champion(root, params, found)
    assert (found.seen, found.problems) == ([("champion", "version 1 of assistant")], [])
    prompt = {"prompt": [{"role": "user", "content": "one two three"}], "gold": None}
    (root / "data/prepared").mkdir()
    (root / "data/prepared/heldout_prompts.jsonl").write_text(json.dumps(prompt) + "\n", encoding="utf-8")
    longer = params.model_copy(update={"ppo": params.ppo.model_copy(update={"max_answer_tokens": 10_000})})
    plan.check_champion(root, longer, found)
    (problem,) = found.problems
    assert "the champion, takes 128 tokens: room for 0 of 1 held-out prompts" in problem.what
    assert "makes this a line of its own" in problem.remedy


def test_chat_explains_its_commands(root: Path, rlhf: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = rlhf("chat", "--model", "models/ppo", questions="/help\n/what\n/quit\nhello\n")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["/reset", "/help", "/quit", "Ctrl-C", "(/what"]


def test_chat_loads_no_deepspeed() -> None:
    code = "import rlhf.cli.speaker, sys; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_who_one_talks_to_is_known_before_a_framework_is_loaded() -> None:
    code = "import rlhf.cli.chat, sys; print(sorted({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
