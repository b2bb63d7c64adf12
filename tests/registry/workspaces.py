"""A workspace with a registered model that answers, as several test files need one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf import config, registry, tracking
from rlhf.config.training import BuiltBase
from rlhf.models.policy import build_policy
from rlhf.workspace.fingerprint import Node

PROJECT = Path(__file__).parents[2]
NODE = Node("ppo", (), ("models/ppo",), (), {})
# what stage evaluate says of a version that passes
GOOD: dict[str, Any] = {
    "gold": {"sft": 0.4, "ppo": 0.7, "difference": 0.3, "ci95": [0.25, 0.35]},
    "win_rate": {"value": 0.8, "ci95": [0.76, 0.84], "judge": "gold"},
    "reward_model": {"accuracy": 0.9, "n": 500, "sft": 0.1, "ppo": 0.9, "ci95": [0.7, 0.9]},
    "kl": 12.0,
    "perplexity": {"sft": 10.0, "ppo": 10.5, "ratio": 1.05},
    "eos_rate": {"sft": 0.95, "ppo": 0.99},
    "answer_tokens": {"sft": 20.0, "ppo": 22.0},
    "heldout": "abc",
    "judge": "def",
}


def changed(path: str, value: Any) -> dict[str, Any]:
    metrics = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    place = metrics
    for key in parents:
        place = place[key]
    place[last] = value
    return metrics


def small(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama that answers one thing and another, for modules that share one server."""
    shape = BuiltBase.model_construct(hidden_size=32, intermediate_size=48, layers=1, heads=4, kv_heads=2, context_tokens=128)
    model = build_policy(shape, tokenizer, 1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model


def load(root: Path) -> config.Params:
    return config.load(root / "params.yaml")


def workspace(root: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A workspace with one version, in service, of a model."""
    for folder in ("models/ppo", "metrics", "data"):
        (root / folder).mkdir(parents=True)
    model.save_pretrained(root / "models/ppo")
    tokenizer.save_pretrained(root / "models/ppo")
    shutil.copyfile(PROJECT / "params.yaml", root / "params.yaml")
    (root / "data/answers.jsonl").write_text("{}\n", encoding="utf-8")
    stage: dict[str, Any] = {"cmd": "true", "outs": ["models/ppo"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": stage}}), encoding="utf-8")
    lock = {"ppo": {"cmd": "true", "outs": [{"path": "models/ppo", "md5": "0123.dir"}]}}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}), encoding="utf-8")
    train(root, 1)
    registry.promote(registry.register(root, load(root)), None, root, load(root), by="me", why="test")
    return root


def train(root: Path, number: int) -> None:
    """Leave behind what a run does: a model, its evaluation, other ones for each number, and an MLflow run with a file."""
    (root / "models/ppo/lineage.json").write_text(json.dumps({"fingerprint": f"f00d{number}"}), encoding="utf-8")
    (root / "metrics/evaluate.json").write_text(json.dumps({"kl": float(number)}), encoding="utf-8")
    folder = root / f"runs/ppo/f00d{number}"
    (folder / "results").mkdir(parents=True)
    (folder / "results/note.txt").write_text(f"run {number}", encoding="utf-8")
    with tracking.of_stage(root, load(root), NODE, f"f00d{number}", folder):
        pass
    tracking.send_waiting(root)
