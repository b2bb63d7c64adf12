"""Pairs out of versions: what they are sampled to answer, and what they answered in their evaluations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import registry
from rlhf.cli import rated
from rlhf.errors import UserError
from rlhf.feedback import database, sample
from rlhf.feedback.tables import Pair
from rlhf.rollout.generate import generate
from tests.registry.workspaces import load, train, workspace


def all_pairs(root: Path) -> list[Pair]:
    record = database.connect(root, load(root))
    with record.reading() as session:
        found = list(session.scalars(select(Pair).order_by(Pair.id)))
    record.close()
    return found


def evaluation(root: Path, **answers: str) -> None:
    """What the next version that is registered answered as it was evaluated."""
    rows = [{"prompt": [{"role": "user", "content": prompt}], "answers": {"sft": "-", "ppo": said}} for prompt, said in answers.items()]
    (root / "data/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_two_versions_make_pairs(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = workspace(tmp_path / "work", llama, tokenizer)
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(params.replace("max_tokens: 64\n  max_body", "max_tokens: 8\n  max_body"))
    monkeypatch.chdir(root)
    for number, answers in ((2, {"Q1": "two", "Q2": "alike", "Q3": "x"}), (3, {"Q1": "three", "Q2": "alike", "Q4": "x"})):
        with torch.no_grad():
            llama.lm_head.weight.mul_(1.5)
        llama.save_pretrained(root / "models/ppo")
        train(root, number)
        evaluation(root, **answers)
        assert registry.register(root, load(root)).number == number

    for new in (1, 0):
        rated.evaluated("3", "2")
        assert capsys.readouterr().out.splitlines()[-1] == f"2 prompts that both answered, {new} new pairs to rate"
    (pair,) = all_pairs(root)
    assert (pair.first_version, pair.first_text, pair.second_version, pair.second_text) == ("assistant/3", "three", "assistant/2", "two")
    with pytest.raises(UserError, match="both version 1"):
        rated.evaluated("1", "champion")

    prompts = root / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n{"prompt": "Who?"}\n')
    asked: list[int] = []

    def ending(*arguments: Any, **options: Any) -> Any:
        made = generate(*arguments, **options)  # random weights hardly ever end
        asked.append(len(made.finish))
        finish: list[Any] = ["length" if len(asked) % 2 else "eos", *["eos"] * (len(made.finish) - 1)]
        return replace(made, finish=finish)

    monkeypatch.setattr(sample, "generate", ending)
    for _ in range(2):  # the seeds are the same, and so are the pairs
        rated.sample(prompts, ["champion", "3"], answers=2, temperature=1.0, limit=None)
    first, second = [line for line in capsys.readouterr().out.splitlines() if "new pairs" in line]
    sampled = all_pairs(root)[1:]
    cut_off = "; 1 of 8 answers were cut off at serving.max_tokens, 8, and are left out"
    assert (first, second) == (f"2 prompts, {len(sampled)} new pairs to rate{cut_off}", f"2 prompts, 0 new pairs to rate{cut_off}")
    assert 2 <= len(sampled) <= 9  # answers may be alike
    assert {pair.prompt[0]["content"] for pair in sampled} == {"Why?", "Who?"}
    assert {pair.first_version for pair in sampled} | {pair.second_version for pair in sampled} == {"assistant/1", "assistant/3"}
    assert all(pair.first_text != pair.second_text and pair.first_seed != pair.second_seed for pair in sampled)
    assert sampled[0].sampling == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8}
    with pytest.raises(UserError, match="one answer makes no pair"):
        rated.sample(prompts, None, answers=1, temperature=1.0, limit=None)
