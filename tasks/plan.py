"""Prefect task of the check before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from rlhf import plan
from rlhf.config import Params


@task(cache_policy=NO_CACHE, name="check", task_run_name="check")
def check(root: Path, params: Params, stages: Sequence[str]) -> None:
    """Look at all that the stages will need.

    Raises:
        UserError: all that is wrong, each with its remedy.
    """
    log = get_run_logger()
    findings = plan.check(root, params, stages)
    for thing, what in findings.seen:
        log.info("%s: %s", thing, what)
    for note in findings.notes:
        log.warning(note)
    findings.refuse()
