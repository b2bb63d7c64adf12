"""What Prefect and MLflow show of a flow run: the report, the table of numbers, the pictures, the way to the MLflow runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prefect import task
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from rlhf import registry, tracking
from rlhf.config import Params
from rlhf.registry import report
from rlhf.registry.course import of_flow
from rlhf.registry.report import Evidence
from tasks.approval import Word
from tasks.origin import tag

REPORT = "report.html"


@task(cache_policy=NO_CACHE, name="evidence", task_run_name="evidence")
def collect(root: Path, params: Params, verdict: registry.Verdict, results: Path) -> Evidence:
    """What the report shows of the workspace; numbers, tables and pictures also go to `results`."""
    compared = verdict.champion not in (None, verdict.version.number) and "promoted" not in verdict.version.tags
    champion = registry.find(root, params, verdict.champion) if compared and verdict.champion else None
    return report.collect(root, verdict, champion, results)


@task(cache_policy=NO_CACHE, name="report", task_run_name="report")
def publish(
    decision: registry.Decision,
    verdict: registry.Verdict,
    word: Word,
    evidence: Evidence,
    root: Path,
    params: Params,
    flow_run_id: str,
    by: str,
    run: tracking.Tracker,
) -> str:
    """Leave the report, as artifacts of Prefect and as page and tags of the flow's MLflow run; returns it."""
    own = tracking.run_of_flow(flow_run_id, root, params)
    assert own  # this flow's tracker keeps a record, by which it is found or opened
    course = of_flow(own, decision.version.tags, by, root, params)
    page = report.markdown(decision, evidence, course)
    run.results.mkdir(parents=True, exist_ok=True)
    title = f"{decision.version.model}, version {decision.version.number}"
    (run.results / REPORT).write_text(report.html(page, title), encoding="utf-8")
    run.tag(report.tags(decision, verdict.champion, course, word.by, word.why))
    # one that was in service before keeps the report of its promotion
    if "report" not in decision.version.tags or "promoted" not in verdict.version.tags:
        registry.tag(decision.version, root, params, "report", f"runs:/{own}/{REPORT}")
    said = decision.lines[-1]
    # Prefect shows the newest first
    for name, picture in evidence.pictures.items():
        create_image_artifact(key=f"plot-{name.replace('_', '-')}", image_url=report.data_uri(picture), description=name)
    create_link_artifact(key="mlflow", link=course.page, link_text="MLflow run of this flow run", description=said)
    create_table_artifact(key="metrics", table=evidence.numbers, description=f"{title}: {evidence.note}")
    create_markdown_artifact(key="evaluation", markdown=page, description=said)
    return page


def announce(decision: registry.Decision, before: int | None, asked: Mapping[str, str]) -> str:
    """Say on the flow run's own page what was decided: an artifact that stands above its tasks', and tags. The outcome, in a word or two.

    Args:
        decision: of the run.
        before: the champion before.
        asked: what whoever started it has asked for.
    """
    version, outcome = decision.version, report.outcome(decision, before)
    parts = [f"# {outcome}", report.text(decision.lines[-1])]
    parts += [f"{name}: {report.text(value)}" for name, value in asked.items()]
    for title, passed in (("Failed", False), ("Passed", True)):
        if lines := [f"- **{gate.name}**: {report.text(gate.text)}" for gate in decision.gates if gate.passed is passed]:
            parts += [f"## {title}", "\n".join(lines)]
    create_markdown_artifact(key="decision", markdown="\n\n".join(parts) + "\n", description=outcome)
    tag(outcome, version.tags["algorithm"], f"{version.model}-v{version.number}")
    return outcome


def summary(decision: registry.Decision) -> str:
    """The decision in a line, with what each gate that failed has measured."""
    failed = [f"{gate.name}: {gate.text}" for gate in decision.gates if not gate.passed]
    return "; ".join([decision.lines[-1].partition("; failed:")[0], *failed])
