"""Bring the run's data to the DVC remote, where one is configured."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from dvc.repo import Repo
from prefect import task
from prefect.cache_policies import NO_CACHE

from rlhf.errors import UserError
from tasks.stage import LAST_LINES, follow


@task(cache_policy=NO_CACHE, task_run_name="push", retries=2, retry_delay_seconds=10)
def push(root: Path) -> bool:
    """Push data, models and the run cache; whether there is a remote to push to.

    Raises:
        UserError: DVC could not.
    """
    with Repo(str(root)) as repo:
        remote = repo.config["core"].get("remote")
    if not remote:
        return False
    lines: deque[str] = deque(maxlen=LAST_LINES)
    if follow(["dvc", "push", "--run-cache"], root, {}, lines.append):
        what = f"data was not pushed to DVC remote '{remote}': {' | '.join(lines)}"
        raise UserError(what, remedy="repair the remote, then run again: nothing is trained twice")
    return True
