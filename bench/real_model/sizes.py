"""What each stage holds with models from 0.1 to 8 billion weights, by the account of `rlhf check` (rlhf/plan/memory.py).

python bench/real_model/sizes.py        GiB of each process, with the lengths and batches of preset qwen2.5-0.5b, bf16

The ways are values for section `launch` and for the stages' adapters; they are printed as `rlhf use` takes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from rlhf import config
from rlhf.config import Params
from rlhf.plan.memory import Shape, need
from rlhf.plan.model import shape_of

PRESET = Path(__file__).resolve().parents[2] / "presets/qwen2.5-0.5b.yaml"
STAGES = ("sft", "reward", "dpo", "ppo", "grpo")
ADAPTERS = {"rank": 16, "alpha": 32, "targets": "all-linear", "learning_rate": 1e-4}
ADAPTED = ("sft.lora", "reward.lora", "dpo.lora", "ppo.actor_lora", "ppo.critic_lora", "grpo.actor_lora")
SPARING: dict[str, Any] = {"launch.gradient_checkpointing": True}
# the ways to place a run: its name, processes of each stage, values
WAYS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("1 GPU", 1, {}),
    ("1 GPU, sparing", 1, SPARING),
    ("1 GPU, adapters, sparing", 1, SPARING | dict.fromkeys(ADAPTED, ADAPTERS)),
    (
        "4 GPUs, ZeRO-2, sparing",
        4,
        SPARING | dict.fromkeys(("launch.engines.policy.zero_stage", "launch.engines.critic.zero_stage"), 2),
    ),
    (
        "8 GPUs, ZeRO-3, sparing",
        8,
        SPARING | {f"launch.engines.{name}.zero_stage": 3 for name in ("policy", "critic", "reference", "reward")},
    ),
)
MODELS: dict[str, PreTrainedConfig] = {
    "SmolLM2 135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen2.5 0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen2.5 1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen2.5 3B": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def main() -> None:
    """Print GiB of each process, by model, way and stage."""
    table = Table("model", "way", *STAGES)
    shapes = {name: shape(given) for name, given in MODELS.items()}
    for name, found in shapes.items():
        for way, processes, values in WAYS:
            params = placed(processes, values)
            table.add_row(name, way, *(f"{need(stage, params, found).total / 2**30:.1f}" for stage in STAGES))
    Console(width=120).print(table)
    for way, processes, values in WAYS:
        words = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}" for key, value in values.items()
        ]
        jobs = [f"launch.jobs.STAGE.processes={processes}"] if processes > 1 else []
        print(f"{way}: {' '.join([*jobs, *words]) or 'the preset as it is'}")


def shape(given: PreTrainedConfig) -> Shape:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(given)
    # tied weights are there once
    return shape_of(given, dict(model.named_parameters()))


def placed(processes: int, values: dict[str, Any]) -> Params:
    raw = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = raw
        for section in sections:
            inner = inner[section]
        inner[last] = value
    for job in raw["launch"]["jobs"].values():
        job["processes"] = processes
    return config.validate(raw, str(PRESET))


if __name__ == "__main__":
    typer.run(main)
