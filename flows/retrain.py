"""The retraining flow: bring every stage of the DVC graph up to date, register the model, promote it if it is better.

It computes nothing itself. `rlhf run` runs it in the current folder.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

from prefect import flow, get_run_logger, runtime
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

import tasks.plan
import tasks.registry
import tasks.report
import tasks.share
from rlhf import config, tracking
from rlhf.errors import UserError
from rlhf.launcher.launch import forget_committed
from rlhf.locks import lock
from rlhf.plan import pinned
from rlhf.registry.history import person
from rlhf.workspace import fingerprint, one_run, served
from rlhf.workspace.find import refuse_experiment
from tasks import graph
from tasks.approval import Word, ask
from tasks.origin import starter, tag
from tasks.stage import StageError, announce, run_stage, stop_all

FIRST_TRAINED = "base"  # every stage but prepare depends on it
LONGEST_REASON = 1500  # characters; more is entered with it in the history, which takes 2000
Until = Literal[
    "prepare", "base", "sft", "reward", "awac", "ppo", "grpo", "dpo", "answers", "best_of_n", "rrhf", "round", "iterative", "evaluate",
]  # a form offers these  # fmt: skip
REMEDY = "the stage's log has the whole story; a new run goes on from the last checkpoint"


@flow(name="retrain", log_prints=True, task_runner=ThreadPoolTaskRunner(max_workers=8))  # type: ignore[arg-type]  # Prefect names a narrower type than it takes
def retrain(
    root: Path | None = None, values: list[str] | None = None, reason: str | None = None, until: Until | str | None = None
) -> dict[str, Any]:
    """Retrain, register and decide. The run's final state is named for what came of it: promoted, refused, champion already, …

    Args:
        root: the workspace; None: the current folder.
        values: changes to params.yaml for this run, each KEY=VALUE, for example ppo.steps=100; it is put back afterwards.
        reason: why it is run; kept with the version, and in the history if it is promoted.
        until: the last stage to run, with those that it needs (for example round-2); nothing is registered then. None: all.

    Returns:
        What happened: `stages` (name → "up to date" or "done"), `version`, `champion`, `promoted`, `failed` (a line per
            gate), `lines` to show.

    Raises:
        UserError: a parameter, params.yaml, an input or the graph is wrong, a stage failed, the data could not be pushed, another version
            became champion meanwhile, or another flow is running in this workspace (params: operations.when_busy).
    """
    root = (root or Path.cwd()).resolve()
    tag(served.name(root))  # by which notices know whose run it was
    params = check(root, reason, until)
    busy = None if params.operations.when_busy == "queue" else f"{root}: another retraining flow is running in this workspace"
    flow_run_id, by = str(runtime.flow_run.id), starter()
    asked = {name: value for name, value in (("reason", reason), ("values", " ".join(values or []))) if value}
    with ExitStack() as to_the_end:
        with lock(root, "flow", refuse=busy), one_run.values(root, values or []):
            params = check(root, reason, until)  # again: a run that waited finds what is there now
            run = to_the_end.enter_context(tracking.of_flow(root, params, flow_run_id, str(runtime.flow_run.name), by))
            run.tag(asked)
            stages = run_stages(root, params, until)
            if until:
                return _stopped(until, stages)
            version = tasks.registry.register(root, params, flow_run_id, asked)
            verdict = tasks.registry.check(version, root, params)
            tasks.share.push(root)
            evidence = tasks.report.collect(root, params, verdict, run.results)
        # nothing below reads the workspace's models: the next run need not wait for a person
        word = Word(person(), "; ".join(filter(None, [reason, f"flow run {runtime.flow_run.name}: all gates passed"])))
        if verdict.may_be_promoted and params.promote.approval.required:
            word = ask(verdict, params.promote.approval)
        decision = tasks.registry.carry_out(verdict, root, params, by=word.by, why=word.why, declined=word.declined)
        tasks.report.publish(decision, verdict, word, evidence, root, params, flow_run_id, by, run)
        outcome = tasks.report.announce(decision, verdict.champion, asked)
    made = {"version": version.number, "champion": decision.champion, "promoted": decision.is_champion, "lines": decision.lines}
    failed = [gate.line for gate in decision.gates if not gate.passed]
    return _completed(outcome, tasks.report.summary(decision), {"stages": stages, "failed": failed} | made)


def _stopped(until: str, stages: dict[str, str]) -> dict[str, Any]:
    said = f"stopped after stage {until}, as asked: nothing was registered"
    made = {"version": None, "champion": None, "promoted": False, "failed": [], "lines": [said]}
    return _completed("stopped", said, {"stages": stages} | made)


def _completed(name: str, message: str, happened: dict[str, Any]) -> dict[str, Any]:
    # Prefect hands the caller what is in the state
    return cast(dict[str, Any], Completed(name=name, message=message, data=happened))


def check(root: Path, reason: str | None = None, until: str | None = None) -> config.Params:
    """Params.yaml, dvc.yaml against its algorithm, the place, and what is asked, before anything is started.

    What the stages will read is looked at by `run_stages`, where one of them is to run.

    Raises:
        UserError: naming what is wrong.
    """
    refuse_experiment(root)
    if reason and len(reason) > LONGEST_REASON:
        raise UserError(f"the reason has {len(reason)} characters, at most {LONGEST_REASON}", remedy="tell it in fewer words")
    params = config.load(root / "params.yaml")
    nodes = fingerprint.read_graph(root)
    fingerprint.check_algorithm(nodes, params)
    if until and until not in nodes:
        raise UserError(f"until: {until} is no stage of algorithm {params.algorithm}", remedy=f"one of {', '.join(nodes)}")
    return params


def run_stages(root: Path, params: config.Params, until: str | None = None) -> dict[str, str]:
    """Bring all stages up to date, or one with those that it needs, independent ones side by side; stages after a failed one do not run.

    Raises:
        UserError: the graph is wrong, or what the stages will need (`rlhf.plan`); stages failed (their last lines), the champion could not
            be compared with what would be trained, or something that the stages read was changed meanwhile.
    """
    graph.mend(root)
    stages = [stage for stage in graph.read(root, until) if not (stage.is_data and stage.current)]
    if any(stage.name == "base" and stage.current for stage in stages):
        pinned.check(root, params)
    if to_do := [stage.name for stage in stages if not stage.current and config.kind(stage.name) in config.STAGES]:
        tasks.plan.check(root, params, to_do)
    announce(stages)
    environment = {"RLHF_FLOW_RUN_ID": str(runtime.flow_run.id)}
    futures: dict[str, PrefectFuture[Any]] = {}
    try:
        for stage in stages:
            before = [futures[name] for name in stage.after if name in futures]
            if stage.name == FIRST_TRAINED and not all(other.current for other in stages):
                futures["champion"] = tasks.registry.check_champion.submit(root, params, return_state=False, wait_for=before)
                before = [futures["champion"]]
            one = run_stage.with_options(name=stage.name, retries=stage.retries)
            futures[stage.name] = one.submit(stage, root, environment, return_state=False, wait_for=before)
        wait(list(futures.values()))
    finally:
        stop_all()
    failures = [
        future.state.result(raise_on_failure=False) for future in futures.values() if future.state.is_failed() or future.state.is_crashed()
    ]
    for failure in failures:
        if isinstance(failure, UserError) and not isinstance(failure, StageError):
            raise failure  # of the champion: it names its own remedy
    if failures:
        raise UserError("; ".join(getattr(failure, "what", str(failure)) for failure in failures), remedy=REMEDY)
    trained = any(not stage.current for stage in stages)
    if changed := [stage.name for stage in (graph.read(root, until) if trained else stages) if not stage.current]:
        what = f"{root}: params, data or code of stage {changed[0]} changed while the flow ran: nothing was registered"
        raise UserError(what, remedy="run it again: what is still up to date is not repeated")
    forget_committed(root)
    get_run_logger().info("%d of %d stages were up to date", sum(stage.current for stage in stages), len(stages))
    return {stage.name: "up to date" if stage.current else "done" for stage in stages}
