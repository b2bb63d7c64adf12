"""What a stage holds in memory, by a simple account, against what the machine has.

For each process, in bytes; W is 4 in fp32 and 2 in half precision, N the weights of a model, T those of them that are trained (the
adapters alone, where it has some), P the processes of the stage:

    weights       W·N of each model that is held; with zero_stage 3 a P-th of it
    gradients     W·T; from zero_stage 2 on a P-th of it
    optimiser     8·T, in half precision 12·T with the fp32 weights; a P-th of it from zero_stage 1 on, and always in half precision
    activations   of micro_batch_tokens, or of one row if that is longer: for each layer W·(12·width + 4·feed-forward), with gradient
                  checkpointing W·width and the whole of one layer; 12 bytes for each word of the vocabulary where logits are computed.
                  While answers are sampled instead: keys and values of launch.rollout.slots answers
    process       Python and its libraries, on a GPU its context: about 1 GiB

What engines offload lies in the machine's memory, not in the GPU's. Weights, gradients and optimiser alone being more than there is, is an
error. The rest is an estimate, and worth a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from rlhf.config import SAMPLING, Params, kind
from rlhf.config.training import BuiltBase, Lora
from rlhf.errors import UserError
from rlhf.launcher.space import MOMENTS, WEIGHT, built_weights, text
from rlhf.plan.findings import Findings

COLUMNS = ("stage", "processes", "weights", "gradients", "optimiser", "activations", "in each process")
PROCESS = 1 << 30
LOGITS = 12  # bytes: logits in fp32, their gradient, and one more on the way
LIMITS_OF_GROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
LESS = (
    "docs/own-model.md, Hardware: a smaller micro_batch_tokens, launch.precision: bf16, adapters (lora), "
    "zero_stage 2 or 3 on more processes, or offloading"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    weights: int
    width: int
    feed_forward: int
    layers: int
    vocabulary: int
    key_values: int  # numbers that a token leaves in a layer's cache
    linear: int = 0  # inputs and outputs of all linear layers, added up: what adapters of rank 1 have


@dataclass(frozen=True)
class Held:
    """A model that a stage holds: its engine of params.yaml, whether it is trained, and its adapters."""

    engine: str
    trained: bool = False
    lora: Lora | None = None
    averages: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes of one process, on its device; and those that it keeps in the machine's memory besides."""

    weights: float = 0
    gradients: float = 0
    optimiser: float = 0
    activations: float = 0
    offloaded: float = 0

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimiser

    @property
    def total(self) -> float:
        return self.states + self.activations + PROCESS


def of_built(base: BuiltBase) -> Shape:
    """Sizes of the small Llama."""
    head = base.hidden_size // base.heads
    return Shape(
        built_weights(base), base.hidden_size, base.intermediate_size, base.layers, base.vocab_size, 2 * base.kv_heads * head,
        base.layers * (10 * base.hidden_size + 3 * base.intermediate_size),
    )  # fmt: skip


def models(stage: str, params: Params) -> list[Held]:
    """The models that a stage holds at a time."""
    frozen = [Held("reference")]
    rewards = [Held("reward")] if params.trains_reward else []
    if stage == "base":
        return [Held("policy", trained=True)] if isinstance(params.base, BuiltBase) else frozen
    if stage == "sft":
        return [Held("policy", True, params.sft.lora)]
    if stage == "reward":
        return [Held("critic", True, params.reward.lora)]
    if stage in ("best_of_n", "rrhf"):
        return [Held("policy", True, getattr(params, stage).lora)]
    if kind(stage) == "round":
        dpo = params.iterative.dpo
        return [Held("policy", True, dpo.lora), *(frozen if dpo.lora is None or dpo.reference == "sft" else [])]
    if kind(stage) in ("answers", "iterative"):
        return [*frozen, *(frozen if stage != "answers" else []), *rewards]
    if stage == "dpo":
        reference = frozen if params.dpo.reference == "live" and params.dpo.lora is None else []
        return [Held("policy", True, params.dpo.lora), *reference]
    if stage == "awac":
        return [Held("policy", True, params.awac.lora), *rewards]
    if stage in ("ppo", "grpo"):
        own = params.ppo if stage == "ppo" else params.grpo
        critic = [Held("critic", True, params.ppo.critic_lora)] if stage == "ppo" else []
        moving = params.grpo.reference_every is not None and stage == "grpo"  # kept in fp32 besides, for checkpoints
        actor = Held("policy", True, own.actor_lora, (own.ema_decay is not None) + moving)
        pulls = stage == "ppo" or params.grpo.kl.coefficient > 0
        return [actor, *critic, *(frozen if (own.actor_lora is None or params.warm_starts) and pulls else []), *rewards]
    judge = [Held("critic", True, params.evaluate.judge.lora)] if params.trains_judge else []
    return [*frozen, *frozen, *rewards, *judge]


def need(stage: str, params: Params, shape: Shape, nodes: int = 1) -> Need:
    """What each process of a stage holds at most."""
    processes = getattr(params.launch.jobs, kind(stage)).processes * nodes
    total = Need(activations=_activations(stage, params, shape))
    for model in models(stage, params):
        total = _added(total, _held(model, params, shape, processes))
    return total


def _held(model: Held, params: Params, shape: Shape, processes: int) -> Need:
    precision, engine = params.launch.precision, getattr(params.launch.engines, model.engine)
    width, zero = WEIGHT[precision], engine.zero_stage
    weights = width * shape.weights / (processes if zero == 3 else 1)
    if not model.trained:
        return Need(offloaded=weights) if engine.offload_parameters else Need(weights=weights)
    trained = model.lora.rank * shape.linear if model.lora else shape.weights
    gradients = width * trained / (processes if zero >= 2 else 1)
    optimiser = MOMENTS[precision] * trained / (processes if zero >= 1 or precision != "fp32" else 1)
    if model.averages:
        weights += 4 * model.averages * shape.weights / (processes if zero == 3 else 1)
    away = (weights if engine.offload_parameters else 0) + (optimiser if engine.offload_optimizer else 0)
    return Need(
        weights=0 if engine.offload_parameters else weights,
        gradients=gradients,
        optimiser=0 if engine.offload_optimizer else optimiser,
        offloaded=away,
    )


def _added(one: Need, other: Need) -> Need:
    return replace(
        one, weights=one.weights + other.weights, gradients=one.gradients + other.gradients, optimiser=one.optimiser + other.optimiser,
        offloaded=one.offloaded + other.offloaded,
    )  # fmt: skip


def _activations(stage: str, params: Params, shape: Shape) -> float:
    width = WEIGHT[params.launch.precision]
    tokens = max(getattr(params.launch.jobs, kind(stage)).micro_batch_tokens, _longest_row(stage, params))
    layer = width * (12 * shape.width + 4 * shape.feed_forward)
    layers = shape.layers * width * shape.width + layer if params.launch.gradient_checkpointing else shape.layers * layer
    training = any(model.trained for model in models(stage, params))
    logits = LOGITS * shape.vocabulary if stage != "reward" else 0
    answers = params.launch.rollout.slots * params.answering.longest
    cache = answers * shape.layers * shape.key_values * width if kind(stage) in SAMPLING else 0
    return max(tokens * ((layers if training else layer) + logits), cache)


def _longest_row(stage: str, params: Params) -> int:
    longest = {"base": 0, **{name: getattr(params, name).max_tokens for name in ("sft", "reward", "awac", "dpo")}}
    return longest.get(stage, params.answering.longest)


# -------------------------------------------------------------------------------------------------------------- machine


def machine() -> int:
    """Bytes of the memory that processes here may take: of the machine, or of the container around them."""
    sizes = [psutil.virtual_memory().total]
    for path in map(Path, LIMITS_OF_GROUP):
        if path.is_file() and (limit := path.read_text(encoding="ascii").strip()).isdecimal():
            sizes.append(int(limit))
    return min(sizes)


def check(stages: Sequence[str], params: Params, shape: Shape, gpus: Sequence[int], nodes: int, findings: Findings) -> None:
    """Hold what each stage needs against what there is.

    Args:
        gpus: bytes of each GPU; none: the stages run on the CPU.
        nodes: of the hostfile; they are taken to be like this one.
    """
    memory = machine()
    there = f"the smallest GPU has {text(min(gpus))}" if gpus else f"this machine has {text(memory)}"
    findings.seen.append(("memory", f"{text(memory)}; {len(gpus)} GPUs, {there}" if gpus else text(memory)))
    too_large, tight = [], []
    for stage in stages:
        if stage == "prepare":
            continue
        processes, one = getattr(params.launch.jobs, kind(stage)).processes, need(stage, params, shape, nodes)
        parts = (one.weights, one.gradients, one.optimiser, one.activations, one.total)
        findings.memory.append((stage, str(processes), *(text(int(part)) for part in parts)))
        held, total = (one.states, one.total) if gpus else ((one.states + one.offloaded) * processes, one.total * processes)
        if held > (min(gpus) if gpus else memory):
            too_large.append(f"{stage} {text(int(held))}")
        elif gpus and one.offloaded * processes > memory:
            too_large.append(f"{stage} {text(int(one.offloaded * processes))} offloaded into {text(memory)} of this machine")
        elif total > (min(gpus) if gpus else memory):
            tight.append(f"{stage} {text(int(total))}")
    if too_large:
        what = f"weights, gradients and optimiser alone take more memory than there is: {', '.join(too_large)}; {there}"
        findings.problems.append(UserError(what, remedy=LESS))
    if tight:
        findings.notes.append(f"by the estimate there may be too little memory: {', '.join(tight)}; {there} ({LESS})")
