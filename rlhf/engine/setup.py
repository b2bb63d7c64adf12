"""A DeepSpeed engine from the params: every setting is derived here, none stands in a JSON file of its own."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from rlhf.config.training import Optimizer
from rlhf.engine.partition import own
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.tensors import shape

deepspeed_logger.setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # at each call that DeepSpeed makes

Module = TypeVar("Module", bound=nn.Module)


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
    groups = [
        {"params": [p for p in trained if len(shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(shape(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters are matrices only


def settings(job: Job, name: str) -> dict[str, Any]:
    """DeepSpeed's settings of engine `name` of launch.engines.

    Raises:
        UserError: the device cannot compute in fp16.
    """
    launch = job.params.launch
    if launch.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("launch.precision is fp16, in which this machine's processor cannot train", remedy="set it to fp32 or bf16")
    engine = getattr(launch.engines, name)
    cpu = {"device": "cpu", "pin_memory": job.device == "cuda"}
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload_parameters:
        zero["offload_param"] = cpu
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it: `backward` says when a batch is over
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps on the CPU as well; DeepSpeed's own would have to be compiled
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": launch.precision == "bf16"},
        "fp16": {"enabled": launch.precision == "fp16"},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU before each forward pass
    }


def train_engine(module: nn.Module, params: Optimizer, job: Job, name: str, total_steps: int) -> DeepSpeedEngine:
    """A DeepSpeed engine that trains a module.

    Args:
        name: its place in launch.engines: policy or critic.
        total_steps: optimiser steps of the whole run, which the schedule spans.
    """
    launch = job.params.launch
    if launch.gradient_checkpointing:
        checkpointed: Any = module
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()  # without dropout it computes the same as in eval; only in train are activations checkpointed
    optimizer = torch.optim.AdamW(
        parameter_groups(module, params.weight_decay), lr=params.learning_rate, betas=params.betas, eps=params.epsilon, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(params, step, total_steps))
    config = settings(job, name) | {"gradient_clipping": params.max_grad_norm}
    zero = config["zero_optimization"]
    if launch.precision != "fp32":
        zero["stage"] = max(1, zero["stage"])
    if zero["stage"] == 1 and job.world_size == 1:
        zero["contiguous_gradients"] = False  # nobody is sent them: a copy of all side by side would be memory for nothing
    if getattr(launch.engines, name).offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": job.device == "cuda"}
    # norms and biases stay whole on every rank: to gather each of them would cost more than it saves
    zero["stage3_param_persistence_threshold"] = max((math.prod(shape(p)) for p in module.parameters() if len(shape(p)) < 2), default=0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, dist_init_required=False, config=config)
    # one rank has nobody to add its gradients up with, yet DeepSpeed would copy all of them there and back
    engine.enable_backward_allreduce = zero["stage"] > 0 or job.world_size > 1
    _spare(engine, zero["stage"], job)
    own(module, engine)
    return engine


def _spare(engine: DeepSpeedEngine, zero_stage: int, job: Job) -> None:
    """Leave out what DeepSpeed does with all gradients, which changes none of them."""
    optimizer: Any = engine.optimizer
    if zero_stage == 1 and job.world_size == 1:
        # with nobody to add them up with, it copies them there, divides them by one and copies them back
        optimizer.buffered_reduce_fallback = lambda *_, **__: None
    if zero_stage in (1, 2) and job.params.launch.precision == "bf16":  # infinite ones show in their norm as well
        optimizer.check_overflow = lambda **_: None


def move_schedule(engine: DeepSpeedEngine, step: int, peak: float) -> None:
    """Let an engine go on as if it had made so many optimiser steps, at another peak learning rate."""
    scheduler: Any = engine.lr_scheduler
    scheduler.last_epoch, scheduler.base_lrs = step, [peak] * len(scheduler.base_lrs)
    for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = peak * factor(step)


def frozen(module: Module, job: Job, name: str, device: torch.device) -> Module:
    """A module that is only scored with, as launch.engines.NAME says; under ZeRO-3 each forward pass gathers what it needs."""
    module.eval().requires_grad_(False)
    if getattr(job.params.launch.engines, name).zero_stage == 0:
        return module.to(device)
    engine, *_ = deepspeed.initialize(model=module, dist_init_required=False, config=settings(job, name))
    own(module, engine)
    return module


def backward(engine: DeepSpeedEngine, loss: torch.Tensor, *, last: bool) -> None:
    """Backward pass of one micro-batch's part of a loss whose denominator is global.

    DeepSpeed averages over ranks, which is undone, so that the gradient is that of the sum.

    Args:
        last: of the micro-batches before the optimiser steps.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * engine.world_size)


def step(engine: DeepSpeedEngine) -> float:
    """Let the optimiser step, after the backward passes of all micro-batches; the global norm of the gradient before clipping.

    Under fp16 an infinite norm means that the scaled gradient overflowed: DeepSpeed leaves the weights as they are and scales less.
    """
    # without ZeRO the optimiser is torch's own, which does not say the norm
    own = [p.grad for p in engine.module.parameters() if p.grad is not None] if engine.zero_optimization_stage() == 0 else []
    norm = torch.nn.utils.get_total_norm(own).item() if own else None
    engine.step()
    return float(engine.get_global_grad_norm()) if norm is None else norm


def step_together(job: Job, engines: Sequence[DeepSpeedEngine]) -> list[float]:
    """Let several optimisers step: all of them, or none if the fp16 gradient of one has overflowed. The norms, as from `step`."""
    if job.params.launch.precision == "fp16":
        for engine in engines:
            engine.optimizer.check_overflow()
        if any(engine.optimizer.overflow for engine in engines):
            return [_skip(engine) for engine in engines]
    return [step(engine) for engine in engines]


def _skip(engine: DeepSpeedEngine) -> float:
    """Have DeepSpeed find an overflow, whatever the gradient: it then drops the gradient and lowers the scale."""
    optimizer = engine.optimizer
    optimizer.check_overflow = lambda **_: setattr(optimizer, "overflow", True)
    norm = step(engine)
    del optimizer.check_overflow
    return norm
