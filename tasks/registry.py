"""Prefect tasks around the model registry: register, compare with the champion, check the gates, decide. Each waits for MLflow first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from rlhf import registry, tracking
from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.launcher.failures import reason
from rlhf.registry import comparison
from tasks.stage import LAST_LINES, follow

SECONDS_TO_COME_BACK = 120
SECONDS_BETWEEN_LOOKS = 5


@task(cache_policy=NO_CACHE, name="register", task_run_name="register")
def register(root: Path, params: Params, flow_run_id: str, asked: Mapping[str, str]) -> registry.Version:
    """Register the policy that was trained, with its evaluation; the same model with the same evaluation keeps its version.

    Args:
        root: the workspace.
        params: of the run.
        flow_run_id: of the run.
        asked: what whoever started it has asked for, as tags of a new version.

    Raises:
        UserError: MLflow is away, and does not come back within two minutes.
    """
    _await_mlflow(root, params)
    tracking.send_waiting(root)  # first: a version's lineage names its stages' runs
    version = registry.register(root, params, flow_run_id)
    new = version.tags["flow_run"] == flow_run_id
    for name, value in asked.items() if new else ():
        registry.tag(version, root, params, name, value)
    get_run_logger().info("%s is version %d%s", version.model, version.number, "" if new else ", registered before")
    return version


def _await_mlflow(root: Path, params: Params) -> None:
    """Wait until MLflow answers.

    Raises:
        UserError: it does not within two minutes.
    """
    deadline = time.monotonic() + SECONDS_TO_COME_BACK
    waiting = False
    while True:
        try:
            registry.aliases(root, params)
            return
        except UserError as away:
            if time.monotonic() > deadline:
                raise
            if not waiting:
                get_run_logger().warning("%s; waiting for it, %d s at most", away.what, SECONDS_TO_COME_BACK)
            waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)


@task(cache_policy=NO_CACHE, name="champion", task_run_name="champion")
def check_champion(root: Path, params: Params) -> None:
    """See to it, before anything is trained, that the new version can be compared with the champion.

    Raises:
        UserError: it cannot.
    """
    try:
        champion = registry.aliases(root, params).get("champion")
    except UserError as away:
        # training goes on without MLflow
        get_run_logger().warning("%s; the champion is not looked at before the training", away.what)
        return
    if champion:
        comparison.check_champion(registry.find(root, params, champion), root, params)


@task(cache_policy=NO_CACHE, name="gates", task_run_name="gates")
def check(version: registry.Version, root: Path, params: Params) -> registry.Verdict:
    """Hold the version against the champion, where there is another one, and check the gates.

    Raises:
        UserError: the comparison failed, or MLflow is away.
    """
    _await_mlflow(root, params)
    champion = registry.aliases(root, params).get("champion")
    pairs = None
    if champion not in (None, version.number) and "promoted" not in version.tags:
        other = registry.find(root, params, champion)
        if not comparison.is_done(version, other, root):
            _compare(root, champion)
        pairs = comparison.pairs(version, other, root)
    return registry.check(version, root, params, pairs)


def _compare(root: Path, champion: int) -> None:
    # in a process of its own: it takes signals and forks, which threads of a flow must not
    lines: deque[str] = deque(maxlen=LAST_LINES)
    if follow(["rlhf", "compare", str(champion)], root, {}, lines.append):
        what = f"the comparison with version {champion} failed: {reason(list(lines))}"
        raise UserError(what, remedy="mend that, then run again: no stage is repeated")


@task(cache_policy=NO_CACHE, name="promote", task_run_name="promote")
def carry_out(
    verdict: registry.Verdict, root: Path, params: Params, *, by: str, why: str, declined: str | None = None
) -> registry.Decision:
    """Move alias champion, or candidate.

    Raises:
        UserError: another version became champion meanwhile, this one's files were changed, or MLflow is away.
    """
    _await_mlflow(root, params)
    decision = registry.carry_out(verdict, root, params, by=by, why=why, declined=declined)
    for line in decision.lines:
        get_run_logger().info(line)
    return decision
