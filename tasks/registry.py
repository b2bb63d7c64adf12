"""Prefect tasks around the model registry: register, then decide."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from rlhf import registry
from rlhf.config import Params


@task(cache_policy=NO_CACHE)
def register(root: Path, params: Params, flow_run_id: str) -> registry.Version:
    """Register the policy that was trained, with its evaluation; the same model with the same evaluation keeps its version."""
    version = registry.register(root, params, flow_run_id)
    new = version.tags["flow_run"] == flow_run_id
    get_run_logger().info("%s is version %d%s", version.model, version.number, "" if new else ", registered before")
    return version


@task(cache_policy=NO_CACHE)
def promote(version: registry.Version, root: Path, params: Params) -> registry.Decision:
    """Check the gates and move alias champion, or candidate."""
    decision = registry.promote(version, root, params)
    for line in decision.lines:
        get_run_logger().info(line)
    return decision
