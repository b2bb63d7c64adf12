"""Whether what is trained could be compared with the champion: asked before the training, of a real (tiny) champion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import registry
from rlhf.errors import UserError
from rlhf.registry import comparison
from tests.registry.workspaces import load, workspace

SHORT, LONG = "What is the opposite of hot?", "What is the opposite of hot? " * 20


@pytest.fixture
def root(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a champion that takes 128 tokens."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return workspace(tmp_path / "root", llama, tokenizer)


def ask(root: Path, *prompts: str, **lengths: int) -> None:
    """Check the champion before a run with these held-out prompts and values of section ppo."""
    rows = [json.dumps({"prompt": [{"role": "user", "content": prompt}], "gold": None}) + "\n" for prompt in prompts]
    (root / "data/prepared").mkdir(exist_ok=True)
    (root / "data/prepared/heldout_prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    params = load(root)
    params = params.model_copy(update={"ppo": params.ppo.model_copy(update=lengths)})
    comparison.check_champion(registry.find(root, params, 1), root, params)


def test_a_champion_with_room_for_most_prompts_is_compared_with(root: Path) -> None:
    ask(root, SHORT)
    ask(root)
    # the lengths alone say nothing of the prompts that there are
    ask(root, SHORT, SHORT, LONG, max_prompt_tokens=500)
    # what is longer than the run's own prompts is not asked
    ask(root, SHORT, LONG, LONG, max_prompt_tokens=100)


@pytest.mark.parametrize(
    ("prompts", "lengths", "few"),
    [
        ((SHORT, LONG, LONG), {"max_prompt_tokens": 500}, "room for 1 of 3 held-out prompts"),
        ((SHORT, SHORT), {"max_answer_tokens": 125}, "room for 0 of 2 held-out prompts"),
    ],
)
def test_one_without_is_named_with_the_remedy(root: Path, prompts: tuple[str, ...], lengths: dict[str, int], few: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(root, *prompts, **lengths)
    assert caught.value.what.startswith(f"version 1 of assistant, the champion, takes 128 tokens: {few}")
    assert "`rlhf use params.yaml promote.model=NAME`" in caught.value.remedy


def test_one_whose_files_were_changed_is_named(root: Path) -> None:
    folder = registry.model_folder("models:/assistant@champion", root, load(root))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing after it was registered"):
        ask(root, SHORT)
