"""Whether the layers are there that adapters are to be put on: peft says so of none, in the stage, and nothing of one among others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rlhf.config import Params, kind
from rlhf.config.training import BuiltBase, Lora
from rlhf.errors import UserError
from rlhf.plan.findings import Findings

BUILT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def of_built(base: BuiltBase) -> frozenset[str]:
    """Names of the linear layers of the small Llama."""
    return frozenset(f"model.layers.{number}.{name}" for number in range(base.layers) for name in BUILT)


def check(stages: Sequence[str], params: Params, model: str, layers: Collection[str], findings: Findings) -> None:
    """Look for the layers that adapters are to be put on.

    Args:
        model: what it is called, for messages.
        layers: names of its linear layers.
    """
    for key, lora in _given(params, stages).items():
        targets = [] if lora is None or lora.targets == "all-linear" else lora.targets
        if gone := [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
            known = sorted({layer.rpartition(".")[2] for layer in layers})
            what = f"{key}.targets: {model} has no linear layer named {', '.join(gone)}"
            findings.problems.append(UserError(what, remedy=f"names of this model: {', '.join(known)}"))


def _given(params: Params, stages: Sequence[str]) -> dict[str, Lora | None]:
    """The adapters of the stages, by their keys in params.yaml."""
    own = ("sft", "reward", "awac", "dpo", "best_of_n", "rrhf")
    adapters = {f"{stage}.lora": getattr(params, stage).lora for stage in own if stage in stages}
    if any(kind(stage) == "round" for stage in stages):
        adapters["iterative.dpo.lora"] = params.iterative.dpo.lora
    if "ppo" in stages:
        adapters |= {"ppo.actor_lora": params.ppo.actor_lora, "ppo.critic_lora": params.ppo.critic_lora}
    if "grpo" in stages:
        adapters["grpo.actor_lora"] = params.grpo.actor_lora
    if "evaluate" in stages and params.trains_judge:
        adapters["evaluate.judge.lora"] = params.evaluate.judge.lora
    return adapters
