"""Tiny DVC workspaces whose stages are shell commands, the flow's walk through one, and what Prefect keeps of it."""

import json
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from transformers import LlamaConfig, LlamaForCausalLM

from flows.retrain import run_stages
from rlhf import config

PROJECT = Path(__file__).parents[2]
METRICS = {
    "gold": None,
    "win_rate": {"value": 0.8, "ci95": [0.76, 0.84], "judge": "second reward model"},
    "reward_model": {"accuracy": 0.9, "n": 500, "ci95": [0.5, 0.7]},
    "kl": 12.0,
    "perplexity": {"sft": 10.0, "ppo": 10.5, "ratio": 1.05},
    "eos_rate": {"sft": 0.95, "ppo": 0.99},
    "answer_tokens": {"sft": 20.0, "ppo": 22.0},
    "heldout": "abc",
}


def pipeline(root: Path, stages: dict[str, dict[str, Any]]) -> None:
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))


@flow
def walk(root: Path, model: str = "assistant") -> dict[str, str]:
    shipped = config.load(PROJECT / "params.yaml")
    return run_stages(root, shipped.model_copy(update={"promote": shipped.promote.model_copy(update={"model": model})}))


def whole_pipeline(root: Path) -> None:
    """Two stages that copy a model and its evaluation, which stand there from the start."""
    made = root / "made"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(made)
    (made / "lineage.json").write_text(json.dumps({"fingerprint": "f00d"}))
    (root / "evaluate.json").write_text(json.dumps(METRICS))
    (root / "samples.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "a|b<i>"}], "sft": "x", "ppo": "y"}) + "\n")
    (root / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    (root / "answers.jsonl").write_text("{}\n")
    (root / "gold_against_kl.csv").write_text("step,loss\n1,2\n2,1\n")
    copying = "mkdir -p metrics data plots; cp evaluate.json metrics; cp samples.jsonl answers.jsonl data; cp gold_against_kl.csv plots"
    pipeline(
        root,
        {
            "ppo": {"cmd": "mkdir -p models && cp -r made models/ppo", "deps": ["made"], "outs": ["models/ppo"]},
            "evaluate": {
                "cmd": copying,
                "deps": ["models/ppo"],
                "outs": ["data/samples.jsonl", "data/answers.jsonl"],
                "metrics": [{"metrics/evaluate.json": {"cache": False}}],
                "plots": [{"plots/gold_against_kl.csv": {"cache": False, "x": "step", "y": "loss"}}],
            },
        },
    )


def artifacts(key: str) -> list[Artifact]:
    """A key's artifacts, oldest first."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC)
    return found[::-1]
