"""Room on the disk: what a stage will write at most, checked before it starts; and what is told where the disk is full all the same.

The estimate, in bytes:

    checkpoints   launch.checkpoints.keep + 2 (the best one, and the one being written) times, for each model that the stage trains,
                  weights and Adam's two moments; in half precision the fp32 weights besides; with adapters the weights alone
    models        weights of each model that the stage writes, a given one that base pins among them; DVC's cache and the registry link
                  to them
    records       4 bytes for each token of the rollouts of ppo or grpo, 10 for one that answers writes with its number; for
                  prepare the raw files, ten times those that are compressed, and as much again for what it packs for as long as it runs

Logs, metrics and what an estimate misses have operations.spare_gib. What the stage has on the disk already is not needed again.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rlhf.config import Params, kind
from rlhf.config.data import FileSource
from rlhf.config.training import BuiltBase, Lora, PretrainedBase
from rlhf.errors import UserError

GIB = 1 << 30
WEIGHT = {"fp32": 4, "bf16": 2, "fp16": 2}
MOMENTS = {"fp32": 8, "bf16": 12, "fp16": 12}  # in half precision the optimiser holds fp32 weights, too
AVERAGE = 4
TOKEN = 4
ANSWER = 10  # a token with its number
COMPRESSED = dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".parquet"), 10)


@dataclass(frozen=True)
class Estimate:
    """Bytes that a stage writes at most: `checkpoints` of one checkpoint, of which there are `count` at a time."""

    count: int
    checkpoints: int
    models: int
    records: int

    @property
    def total(self) -> int:
        return self.count * self.checkpoints + self.models + self.records

    @property
    def line(self) -> str:
        parts = [f"{self.count} checkpoints of {text(self.checkpoints)}"] if self.checkpoints else []
        parts += [f"{text(size)} of {name}" for name, size in (("models", self.models), ("records", self.records)) if size]
        return ", ".join(parts)


def check(root: Path, stage: str, params: Params, folder: Path) -> None:
    """Check that there is room for a stage.

    Args:
        folder: of the stage's run, on the disk that it will write to.

    Raises:
        UserError: there is not; with the estimate and what is free.
    """
    base = weights(root / params.base.model) if stage == "base" and isinstance(params.base, PretrainedBase) else None
    needed = estimate(root, stage, params, base)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    spare = int(params.operations.spare_gib * GIB)
    free = shutil.disk_usage(folder).free
    if needed.total - there + spare > free:
        parts = f"{needed.line}; " if needed.total else ""
        what = f"stage {stage} would write {text(max(needed.total - there, 0))} at most ({parts}{text(there)} of it is there), "
        what += f"{text(spare)} are to stay free (operations.spare_gib), and the disk of {folder.parent} has {text(free)} left"
        raise UserError(what, remedy="make room (`rlhf gc --dry-run` lists what nothing needs), or lower launch.checkpoints.keep")


def estimate(root: Path, stage: str, params: Params, base: int | None = None) -> Estimate:
    """What a stage writes at most.

    Args:
        base: weights of the base model, where they are known before it lies in models/base.

    Raises:
        UserError: the weights of an input cannot be read.
    """
    precision = params.launch.precision
    trained = _trained(root, stage, params, base)
    models = [count for count, _ in trained[:1]]  # of ppo's two the policy alone is published
    checkpoint = sum(count * (WEIGHT[precision] + (0 if lora else MOMENTS[precision])) for count, lora in trained)
    if stage == "base" and isinstance(params.base, PretrainedBase):
        models = [base or 0]
    records = 0
    if stage in ("ppo", "grpo"):
        own = params.ppo if stage == "ppo" else params.grpo
        records = own.steps * own.rollout_batch_size * own.longest * TOKEN
        averages = (own.ema_decay is not None) + (stage == "grpo" and params.grpo.reference_every is not None)
        checkpoint += averages * AVERAGE * models[0]
    if kind(stage) in ("answers", "iterative"):
        said = params.answers
        asked = said.heldout_prompts + (said.prompts + said.pairs) * len(said.temperatures) * said.answers_per_temperature
        records = asked * said.longest * ANSWER
    if stage == "iterative":  # the best round's
        models = [weights(root / "models" / "sft") if base is None else base]
    if stage == "prepare":
        records = sum(_raw(root, source) for source in params.data.sources if isinstance(source, FileSource))
    return Estimate(params.launch.checkpoints.keep + 2, checkpoint, sum(models) * WEIGHT[precision], records)


def _trained(root: Path, stage: str, params: Params, base: int | None) -> list[tuple[int, Lora | None]]:
    """How many weights each model has that the stage trains, and its adapters."""

    def of(name: str) -> int:
        return weights(root / "models" / name) if base is None else base

    if stage == "base":
        return [(built_weights(params.base), None)] if isinstance(params.base, BuiltBase) else []
    if stage == "evaluate":
        # where there is no gold score, a judge is trained
        return [(of("base"), params.evaluate.judge.lora)] if params.trains_judge else []
    starts: dict[str, list[tuple[str, Lora | None]]] = {
        "sft": [("base", params.sft.lora)],
        "reward": [("base", params.reward.lora)],
        "awac": [("sft", params.awac.lora)],
        "ppo": [("sft", params.ppo.actor_lora), ("reward", params.ppo.critic_lora)],
        "grpo": [("sft", params.grpo.actor_lora)],
        "dpo": [("sft", params.dpo.lora)],
        "best_of_n": [("sft", params.best_of_n.lora)],
        "rrhf": [("sft", params.rrhf.lora)],
        "round": [("sft", params.iterative.dpo.lora)],
    }
    return [(of(name), lora) for name, lora in starts.get(kind(stage), [])]


def built_weights(base: BuiltBase) -> int:
    """Weights of the small Llama: tied embeddings; attention (queries, output, keys, values), feed-forward and norms of each layer."""
    width = base.hidden_size
    attention = 2 * width * width + 2 * width * width * base.kv_heads // base.heads
    return base.vocab_size * width + base.layers * (attention + 3 * width * base.intermediate_size + 2 * width) + width


def weights(folder: Path) -> int:
    """How many weights a model folder holds, by the heads of its files.

    Raises:
        UserError: a file is damaged.
    """
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dictionary
        except SafetensorError as error:
            what = f"{path}: damaged safetensors file: {error}"
            raise UserError(what, remedy=f"bring it back with `dvc checkout --force {folder.parent.name}/{folder.name}`") from None
    return count


def _raw(root: Path, source: FileSource) -> int:
    """Bytes of a source's rows, packed and as JSON lines; those of a hub dataset are not known before it is there."""
    if source.path is None:
        return 0
    place = root / source.path
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    passes = max(1.0, source.weight)
    return int((1 + passes) * sum(path.stat().st_size * COMPRESSED.get(path.suffix, 1) for path in files))


def text(size: int) -> str:
    """A size for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
