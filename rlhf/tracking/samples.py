"""Answers of each step of training with their rewards, as one table: in MLflow's pages, where it can be filtered, and in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OF_A_STEP = 8  # answers
STEPS = 500  # at most, evenly chosen; the first and the last are among them
ARTIFACT = "samples.json"
# how MLflow's pages, and mlflow.load_table, know it for a table
TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": ARTIFACT, "type": "table"}])}


def write(rollouts: Path, table: Path) -> bool:
    """Write the table of a file of rollouts, in the form of mlflow.log_table; whether there is anything to show."""
    rows = [row for step in chosen(rollouts, STEPS) for row in step[:OF_A_STEP]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if rows:
        table.parent.mkdir(parents=True, exist_ok=True)
        content = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
        table.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return bool(rows)


def chosen(rollouts: Path, most: int) -> list[list[dict[str, Any]]]:
    """Of so many steps the first answers, as rows of the table."""
    if not rollouts.exists():
        return []
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in _lines(rollouts):
        answers = steps.setdefault(line["step"], [])
        if len(answers) < OF_A_STEP:
            answers.append(_row(line))
    numbers = sorted(steps)
    wanted = min(most, len(numbers))
    places = [round(place * (len(numbers) - 1) / max(1, wanted - 1)) for place in range(wanted)]
    return [steps[numbers[place]] for place in places]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # the last one may be under way
                yield json.loads(line)


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    said = "\n".join(f"{turn['role']}: {turn['content']}" for turn in line["prompt"])
    about = {name: line[name] for name in ("source",) if name in line}
    reference = {"reference": json.dumps(line["reference"], ensure_ascii=False)} if "reference" in line else {}
    rewards = {f"reward/{name}": score for name, score in line.get("rewards", {}).items()}
    return {
        "step": line["step"],
        **about,
        "prompt": said,
        **reference,
        "answer": line["answer"],
        "score": line["score"],
        **rewards,
        "kl": line["kl"],
    }
