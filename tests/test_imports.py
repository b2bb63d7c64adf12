"""Imports go one way: from a layer to those below it, and what trains knows nothing of Prefect, DVC and MLflow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# from the ground up: a part (a package, or a module that stands by itself) imports parts of lower layers, and none of its own layer
LAYERS = (
    ("rlhf.redact", "rlhf.kernels", "rlhf.documents"),
    ("rlhf.tensors",),
    ("rlhf.errors",),
    ("rlhf.paths", "rlhf.locks", "rlhf.algorithms"),
    ("rlhf.config",),
    ("rlhf.job", "rlhf.workspace", "rlhf.data", "rlhf.rewards"),
    ("rlhf.engine",),
    ("rlhf.models",),
    ("rlhf.rollout",),
    ("rlhf.stages",),
    ("rlhf.tracking",),
    ("rlhf.launcher",),
    ("rlhf.registry",),
    ("rlhf.feedback",),
    ("rlhf.plan", "rlhf.serving"),
    ("rlhf.sweep",),
    ("tasks",),
    ("flows",),
    ("rlhf.cli",),
)
LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}
# what runs in a stage's process
TRAINING = (
    "algorithms",
    "config",
    "data",
    "documents",
    "engine",
    "kernels",
    "models",
    "rewards",
    "rollout",
    "stages",
    "errors",
    "job",
    "paths",
    "redact",
    "tensors",
)


def modules(*places: str) -> Iterator[Path]:
    for place in places:
        path = ROOT / place.replace(".", "/")
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(name: str) -> str | None:
    """The part that a module, or a name in one, belongs to; None where it is not the project's."""
    return next((part for part in LAYER if f"{name}.".startswith(f"{part}.")), None)


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions and for types as well."""
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


def test_every_module_belongs_to_a_layer() -> None:
    assert [name for name in map(name_of, modules("rlhf", "tasks", "flows")) if name != "rlhf" and part_of(name) is None] == []
    assert [part for part in LAYER if not any(path.exists() for path in modules(part))] == []


def test_no_import_goes_up_and_no_two_packages_import_each_other() -> None:
    wrong = []
    for path in modules("rlhf", "tasks", "flows"):
        own = part_of(name_of(path))
        for name in sorted(imported(path)):
            other = part_of(name)
            if own and other and own != other and LAYER[other] >= LAYER[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = {name_of(path): path for path in modules("rlhf", "tasks", "flows")}
    graph = {
        name: {word if word in paths else word.rpartition(".")[0] for word in imported(path)} & paths.keys() for name, path in paths.items()
    }
    TopologicalSorter(graph).prepare()  # it raises CycleError, which names them


def test_training_code_runs_on_a_bare_image() -> None:
    paths = modules(*(f"rlhf.{part}" for part in TRAINING))
    away = {"prefect", "dvc", "mlflow", "typer", "rich", "flows", "tasks"}
    away |= {f"rlhf.{part}" for part in ("cli", "launcher", "registry", "tracking", "workspace")}
    assert offences(paths, away) == []


def test_rlhf_knows_neither_flows_nor_tasks() -> None:
    # the command line starts flows and shows them: it stands above all three
    above = ROOT / "rlhf/cli"
    assert offences((path for path in modules("rlhf") if above not in path.parents), {"flows", "tasks", "prefect", "rlhf.cli"}) == []


def test_tasks_know_no_flow() -> None:
    assert offences(modules("tasks"), {"flows", "rlhf.cli"}) == []


def test_losses_take_tensors_only() -> None:
    forbidden = {f"rlhf.{name}" for name in ("stages", "engine", "rollout", "data", "models", "job")} | {"deepspeed", "transformers"}
    assert offences(modules("rlhf.algorithms", "rlhf.tensors"), forbidden) == []


def test_layers_below_the_stages() -> None:
    assert offences(modules("rlhf.engine", "rlhf.rollout", "rlhf.data", "rlhf.models"), {"rlhf.stages"}) == []


def test_data_is_texts_without_tensors() -> None:
    assert offences(modules("rlhf.data", "rlhf.rewards"), {"torch", "transformers"}) == []


def test_mlflow_stays_where_it_belongs() -> None:
    at_home = {*modules("rlhf.tracking", "rlhf.registry")}
    assert offences((path for path in modules("rlhf") if path not in at_home), {"mlflow"}) == []
