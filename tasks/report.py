"""The page that Prefect shows for a flow run: gates, numbers and sample answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from rlhf import gates
from rlhf.job import read_lines
from rlhf.registry import EVALUATED, Decision

SAMPLES = Path("data/samples.jsonl")
SHOWN = 8


@dataclass(frozen=True)
class Evidence:
    """The numbers of stage evaluate, and some of the answers that they came from."""

    metrics: dict[str, Any]
    samples: list[dict[str, Any]]


@task(cache_policy=NO_CACHE)
def publish(decision: Decision, evidence: Evidence) -> str:
    """Make the page and store it as Prefect artifact `evaluation`; returns it."""
    page = markdown(decision, evidence)
    create_markdown_artifact(key="evaluation", markdown=page, description=decision.lines[-1])
    return page


def evidence(root: Path) -> Evidence:
    """What the page shows, read while the workspace is this run's."""
    return Evidence(gates.read_metrics(root), read_lines(root / SAMPLES)[:SHOWN] if (root / SAMPLES).exists() else [])


def markdown(decision: Decision, evidence: Evidence) -> str:
    """The page."""
    metrics = evidence.metrics
    parts = [f"# {decision.version.model}, version {decision.version.number}", f"{decision.lines[-1]}.", "## Gates"]
    parts.append(
        _table(("gate", "passed", "measured"), [(gate.name, "yes" if gate.passed else "**no**", gate.text) for gate in decision.gates])
    )
    parts += [
        "## Measured on held-out data",
        _table(("metric", "value"), [(name, metrics[name]) for name in EVALUATED if metrics.get(name) is not None]),
    ]
    if evidence.samples:
        policies = ("sft", decision.version.tags["algorithm"])
        rows = [(_prompt(row["prompt"]), *(row[name] for name in policies)) for row in evidence.samples]
        parts += ["## Sample answers", _table(("prompt", *policies), rows)]
    return "\n\n".join(parts) + "\n"


def _prompt(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_cell, value)) + "]"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
