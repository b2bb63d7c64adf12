"""Stop a run that has diverged, before a checkpoint or an output is made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlhf.errors import UserError
from rlhf.job import Job


def check(job: Job, step: int, metrics: Mapping[str, float], bounds: Mapping[str, float]) -> None:
    """Check the numbers of a step, after the optimiser has stepped and before anything is saved.

    Args:
        metrics: by name; none may be NaN or infinite, but for the gradient's norm under fp16: that step was left out.
        bounds: name of a metric → the key's value in params under STAGE.stop: its largest absolute value.

    Raises:
        UserError: names the number, the bound and the step.
    """
    kept = job.folder / "checkpoints"
    where = f"the last checkpoint is kept in {kept}" if any(kept.glob("step-*")) else "no checkpoint had been made"
    remedy = f"{where}; lower the learning rate of {job.stage}, or look at its data"
    for name, value in metrics.items():
        skipped = job.params.launch.precision == "fp16" and name.endswith("grad_norm")
        if not math.isfinite(value) and not skipped:
            raise UserError(f"stage {job.stage} diverged: {name} is {value} at step {step}", remedy=remedy)
        if abs(value) > bounds.get(name, math.inf):
            raise UserError(
                f"stage {job.stage} diverged: {name} is {value:.4g} at step {step}, beyond {job.stage}.stop.{name} = {bounds[name]:g}",
                remedy=remedy,
            )
