"""Imports go one way: flows → tasks → rlhf, and what trains knows nothing of Prefect, DVC and MLflow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# folders and modules of rlhf that run inside a stage's process
TRAINING = (
    "algorithms",
    "data",
    "engine",
    "models",
    "rollout",
    "stages",
    "config",
    "errors.py",
    "job.py",
    "tensors.py",
    "paths.py",
    "redact.py",
    "space.py",
)


def modules(*places: str) -> Iterator[Path]:
    for place in places:
        path = ROOT / place
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def offences(paths: Iterator[Path], forbidden: set[str]) -> list[str]:
    found = ((path, name) for path in paths for name in sorted(imported(path)))
    return [
        f"{path.relative_to(ROOT)} imports {name}" for path, name in found if any(f"{name}.".startswith(f"{word}.") for word in forbidden)
    ]


def test_training_code_runs_on_a_bare_image() -> None:
    paths = modules(*(f"rlhf/{place}" for place in TRAINING))
    away = {"prefect", "dvc", "mlflow", "typer", "rich", "flows", "tasks"}
    away |= {
        f"rlhf.{name}"
        for name in (
            "cli",
            "launch",
            "registry",
            "tracking",
            "presets",
            "gates",
            "comparison",
            "serving",
            "chat",
            "progress",
            "gc",
            "verify",
        )
    }
    assert offences(paths, away) == []


def test_rlhf_knows_neither_flows_nor_tasks() -> None:
    # the command line starts flows and shows them: it stands above all three
    above = {"cli.py", "progress.py"}
    assert offences((path for path in modules("rlhf") if path.name not in above), {"flows", "tasks", "prefect", "rlhf.cli"}) == []


def test_tasks_know_no_flow() -> None:
    assert offences(modules("tasks"), {"flows", "rlhf.cli"}) == []


def test_losses_take_tensors_only() -> None:
    forbidden = {f"rlhf.{name}" for name in ("stages", "engine", "rollout", "data", "models", "job")} | {"deepspeed", "transformers"}
    assert offences(modules("rlhf/algorithms", "rlhf/tensors.py"), forbidden) == []


def test_layers_below_the_stages() -> None:
    assert offences(modules("rlhf/engine", "rlhf/rollout", "rlhf/data", "rlhf/models"), {"rlhf.stages"}) == []


def test_mlflow_stays_where_it_belongs() -> None:
    at_home = {*modules("rlhf/tracking.py", "rlhf/sending.py", "rlhf/machine.py", "rlhf/registry", "rlhf/serving.py")}
    assert offences((path for path in modules("rlhf") if path not in at_home), {"mlflow"}) == []
