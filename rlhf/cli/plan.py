"""`rlhf check`: what a check of the plan has found, on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf import config, plan
from rlhf.plan import pinned
from rlhf.plan.findings import Findings
from rlhf.plan.memory import COLUMNS
from rlhf.workspace import dag, fingerprint


def check(root: Path) -> Findings:
    """Look at the plan as if no stage had run yet.

    Raises:
        UserError: params.yaml cannot be read.
    """
    # transformers loads them wherever it can, which takes longer than the whole check
    modules: dict[str, Any] = sys.modules
    modules.update(sklearn=None, scipy=None)
    params = config.load(root / "params.yaml")
    findings = Findings()
    with findings.collecting():
        fingerprint.check_algorithm(fingerprint.read_graph(root), params)
        if (root / "dvc.yaml").read_text(encoding="utf-8") != dag.text(root, params):
            findings.notes.append("dvc.yaml is not as `rlhf use` writes it: DVC does not see a change of what it does not list")
            _graph_of_dvc(root)
    found = plan.check(root, params, params.stages)
    with found.collecting():
        pinned.check(root, params)
    plan.check_champion(root, params, found)
    found.problems[:0] = findings.problems
    found.notes += findings.notes
    return found


def _graph_of_dvc(root: Path) -> None:
    from tasks import graph  # it loads DVC, which takes as long as the whole check

    graph.check(root)


def show(findings: Findings) -> None:
    """Print what was seen, then what is worth a look, then all that is wrong."""
    console = Console()
    seen = Table(box=None, show_header=False)
    for thing, what in findings.seen:
        seen.add_row(thing, what)
    console.print(seen, highlight=False)
    if findings.memory:
        needed = Table(*COLUMNS, box=None, title="memory by the estimate (docs/own-model.md)", title_justify="left")
        for row in findings.memory:
            needed.add_row(*row)
        console.print("", needed, highlight=False)
    for note in findings.notes:
        print(f"note: {note}")
    for problem in findings.problems:
        print(f"error: {problem.what}\n  remedy: {problem.remedy}", file=sys.stderr, flush=True)
