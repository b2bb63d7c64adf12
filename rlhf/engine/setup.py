"""A DeepSpeed engine from the params: every setting is derived here, none stands in a JSON file of its own."""

from __future__ import annotations

import logging
import math

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from rlhf.config.training import Optimizer
from rlhf.engine.distributed import accumulation, layout
from rlhf.job import Job

deepspeed_logger.setLevel(logging.WARNING)


def learning_rate_factor(params: Optimizer, step: int, total: int) -> float:
    """Share of the peak learning rate at an optimiser step: linear warm-up from 0, then the schedule down to final_ratio."""
    warmup = round(params.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if params.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    remaining = 1 - progress if params.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return params.final_ratio + (1 - params.final_ratio) * remaining


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only: not on norms and biases."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def train_engine(module: nn.Module, params: Optimizer, job: Job, batch_size: int, total_steps: int) -> DeepSpeedEngine:
    """A DeepSpeed engine that trains a module.

    Args:
        batch_size: rows of an optimiser step over all ranks; accumulation is derived from it.
        total_steps: optimiser steps of the whole run, which the schedule spans.
    """
    launch = job.params.launch
    optimizer = torch.optim.AdamW(
        parameter_groups(module, params.weight_decay), lr=params.learning_rate, betas=params.betas, eps=params.epsilon, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(params, step, total_steps))
    steps = accumulation(batch_size, job)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": layout(job).micro_batch_size,
            "gradient_accumulation_steps": steps,
            "gradient_clipping": params.max_grad_norm,
            "zero_optimization": {"stage": launch.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": launch.precision == "bf16"},
            "steps_per_print": 10**9,
        },
    )
    return engine


def backward(engine: DeepSpeedEngine, loss: torch.Tensor) -> None:
    """Backward pass of one micro-batch's part of a loss whose denominator is global.

    DeepSpeed divides by the accumulation steps and averages over ranks; both are undone, so that the gradient is that of the sum.
    """
    engine.backward(loss * (engine.gradient_accumulation_steps() * engine.world_size))
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # it only counts here


def step(engine: DeepSpeedEngine) -> float:
    """Let the optimiser step, after the backward passes of all micro-batches; the global norm of the gradient before clipping."""
    # DeepSpeed does not say the norm where the optimiser is torch's own
    own = [p.grad for p in engine.module.parameters() if p.grad is not None] if engine.zero_optimization_stage() == 0 else []
    norm = torch.nn.utils.get_total_norm(own).item() if own else None
    engine.step()
    return float(engine.get_global_grad_norm()) if norm is None else norm
