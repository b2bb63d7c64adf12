"""Runs one stage: checks its inputs, starts its processes, follows them, and publishes what they wrote.

docs/architecture.md, "Between launcher and stage", is the contract with the stage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config, tracking
from rlhf.errors import UserError
from rlhf.launcher import command, functions, processes, space
from rlhf.launcher.console import Console
from rlhf.launcher.given import check_base, check_base_is_apart
from rlhf.locks import lock
from rlhf.paths import inside
from rlhf.workspace import fingerprint
from rlhf.workspace.find import home, is_deleted


class StageError(Exception):
    """The stage's processes ended with another exit code than 0."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"exit code {code}")


def launch(stage: str, root: Path, package: str = "rlhf.stages") -> int:
    """Run a stage of dvc.yaml and publish its outputs; the exit code.

    Args:
        stage: its name.
        root: the workspace.
        package: where the stages' modules are.

    Raises:
        UserError: params.yaml, dvc.yaml, an input, the port or an output's place is wrong; there is no room on the disk; the stage is being
            run already, took too long, did not write an output, or its inputs changed meanwhile.
    """
    root = root.resolve()
    params, graph = ready(root, stage)
    check_base(root, stage, params)
    if stage == "base":
        check_base_is_apart(root, params)
    check_places(root, graph[stage])
    processes.stop_with_its_starters()
    try:
        with processes.stoppable(), lock(root, stage, refuse=f"stage {stage} is being run already"):
            run = open_run(root, params, graph[stage])
            if not run.done.exists():
                space.check(root, stage, params, run.folder)
            with tracking.of_stage(root, params, run.node, run.fingerprint, run.folder):
                if not run.done.exists():
                    train(run, f"{package}.{config.kind(stage)}")
                    seal(run)
                publish(run)
            clean(run)
            forget_committed(root)
    except processes.Stopped as stop:
        anew = "DVC deletes its folder: queued again, it begins anew" if is_deleted(root) else "a rerun goes on from the last checkpoint"
        print(f"{stage}: stopped by {stop}; {anew}", file=sys.stderr, flush=True)
        return 128 + stop.number
    except StageError as failure:
        return failure.code
    return 0


# --------------------------------------------------------------------------------------------------------------- before


@dataclass(frozen=True)
class Run:
    """One run of a stage, and its folder runs/STAGE/FINGERPRINT."""

    root: Path
    params: config.Params
    node: fingerprint.Node
    inputs: dict[str, str]
    fingerprint: str
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def functions(self) -> list[str]:
        """The files of reward functions that the stage calls."""
        return [file for file in self.params.reward_files if file in self.inputs]

    @property
    def done(self) -> Path:
        """There once the outputs are whole; what a kill leaves to do then is moving them."""
        return self.out / "DONE"

    @property
    def published(self) -> Path:
        return self.folder / "PUBLISHED"


def check_places(root: Path, node: fingerprint.Node) -> None:
    """Check that the outputs can be written, before the hours that go into them.

    Raises:
        UserError: names the output that cannot, or whose folder is a link out of the workspace.
    """
    for path in node.written:
        place = inside(root, Path(path).parent, f"output {path} of stage {node.name}")
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise _unwritable(path, error) from None


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(f"{path}: output cannot be written: {error.strerror}", remedy="make its folder writable, with room on the disk")


def open_run(root: Path, params: config.Params, node: fingerprint.Node) -> Run:
    """The run of these inputs: a new one, or one to go on with.

    What was published and is wanted again was deleted on purpose, unless DVC had not come to keep it: then it is published once more.
    """
    inputs = hash_inputs(root, params, node)
    fingerprint.check_models(root, node.inputs, inputs)
    name = fingerprint.fingerprint(node.name, params.of_stage(node.name), inputs)
    run = Run(root, params, node, inputs, name, root / "runs" / node.name / name)
    if run.published.exists() and (is_committed(run.folder, root, node) or not run.done.exists()):
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    _write(run.folder / "inputs.json", inputs)
    functions.keep(root, run.functions, inputs, run.folder)
    return run


def hash_inputs(root: Path, params: config.Params, node: fingerprint.Node) -> dict[str, str]:
    """The hashes of a stage's inputs; a base model given as a folder is one that dvc.yaml cannot name."""
    base = params.base
    given = [base.model] if node.name == "base" and base.source == "pretrained" and (root / base.model).is_dir() else []
    return fingerprint.hash_inputs(root, [*node.inputs, *given])


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- during


def train(run: Run, module: str) -> None:
    """Run the stage's processes to their end.

    Raises:
        StageError: they failed; why stands on the terminal and in the log.
        UserError: they took too long, or there are too few GPUs.
    """
    stage, settings = run.node.name, run.params.launch
    shutil.rmtree(run.out, ignore_errors=True)
    run.out.mkdir()
    (run.folder / "FINISHED").unlink(missing_ok=True)
    _end_last_line(run.folder / "metrics.jsonl")
    gpus = [] if stage == "prepare" else command.find_gpus(settings.accelerator)
    with held(run.root, stage, run.params, gpus) as numbers, Console(stage, run.folder / "log.txt") as console:
        words = command.command(stage, module, run.params, numbers)
        environment = command.environment(stage, run.params, run.root, run.folder, "cuda" if gpus else "cpu")
        try:
            code = processes.run(words, run.root, environment, settings.timeout_minutes * 60, console.show)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"stage {stage} was stopped after {settings.timeout_minutes:g} minutes (launch.timeout_minutes)",
                remedy="raise it and rerun: the stage goes on from its last checkpoint",
            ) from None
    # DeepSpeed's launcher also ends with 0 when a part of it was killed: then no rank came to its end
    if code or not (run.folder / "FINISHED").exists():
        console.explain(code)
        shutil.rmtree(run.out, ignore_errors=True)  # half an output only takes room
        raise StageError(code if code > 0 else 1)


def _end_last_line(path: Path) -> None:
    """Cut off what a kill, or a full disk, has left of a line: the stage writes on behind it."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def ready(root: Path, stage: str) -> tuple[config.Params, dict[str, fingerprint.Node]]:
    """Params and graph of a stage whose inputs are there.

    Raises:
        UserError: params.yaml or dvc.yaml is wrong, the graph has no such stage, or an input is missing.
    """
    params = config.load(root / "params.yaml")
    graph = fingerprint.read_graph(root)
    fingerprint.check_algorithm(graph, params)
    if stage not in graph:
        raise UserError(f"dvc.yaml: no stage '{stage}'", remedy=f"one of {', '.join(graph)}")
    fingerprint.check_inputs(root, stage, graph)
    return params, graph


def held(root: Path, stage: str, params: config.Params, gpus: list[int]) -> AbstractContextManager[list[int]]:
    """The GPUs of a stage, held for as long as it runs."""
    # a hostfile says itself which devices it means
    if not gpus or params.launch.hostfile:
        return nullcontext(gpus)
    return command.hold_gpus(home(root), stage, gpus, getattr(params.launch.jobs, config.kind(stage)).processes)


# ---------------------------------------------------------------------------------------------------------------- after


def seal(run: Run) -> None:
    """Check what the stage wrote and mark it as whole.

    Raises:
        UserError: an input changed meanwhile, or an output is missing.
    """
    changed = fingerprint.differences(run.inputs, hash_inputs(run.root, run.params, run.node))
    if set(changed) - set(run.functions):  # of those `publish` tells
        # its checkpoints may know the changed file, which their fingerprint denies
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        raise UserError(
            f"{', '.join(changed)} changed while stage {run.node.name} ran: nothing was published", remedy="run the stage again"
        )
    for path in run.node.written:
        if not (run.out / path).exists():
            raise UserError(f"stage {run.node.name} did not write {path}, which dvc.yaml lists", remedy="correct the stage, or dvc.yaml")
    stage = run.node.name
    lineage = {"stage": stage, "fingerprint": run.fingerprint, "params": run.params.of_stage(stage), "inputs": run.inputs}
    for path in run.node.outputs:
        if path.startswith("models/"):
            (run.out / path / fingerprint.LINEAGE).unlink(missing_ok=True)
            files = fingerprint.hash_inputs(run.out / path, ["."])
            _write(run.out / path / fingerprint.LINEAGE, lineage | {"files": files})
    for path in (*run.node.metrics, *run.node.plots):
        copy = run.folder / "results" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.out / path, copy)
    run.done.touch()


def publish(run: Run) -> None:
    """Put each output into its place. Killed at any point, it can be done again.

    Raises:
        UserError: params.yaml or a reward function was edited meanwhile, or a place cannot be written.
    """
    stage = run.node.name
    functions.check(run.root, run.functions, run.inputs, stage, run.folder)
    if config.load(run.root / "params.yaml").of_stage(stage) != run.params.of_stage(stage):
        # dvc.lock would name the new values
        what = f"params.yaml: values of stage {stage} changed while it ran: nothing was published"
        raise UserError(what, remedy="run it again with the new values; or set them back, and what was trained is published at once")
    for path in run.node.written:
        source, target = run.out / path, run.root / path
        beside = target.with_name(f".{target.name}.new")
        try:
            _remove(beside)
            _link(source, beside)
            _remove(target)
            beside.rename(target)
        except OSError as error:
            raise _unwritable(path, error) from None
    run.published.touch()


def _link(source: Path, target: Path) -> None:
    # nobody writes into an output in place: a link does, and spares a copy
    def link(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:  # another file system
            shutil.copyfile(file, place)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)
    else:
        link(str(source), str(target))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean(run: Run) -> None:
    """Delete the checkpoints, and the stage's other runs unless they hold something for MLflow.

    The outputs stay a while where DVC runs the stage: a full disk, or a kill, may keep it from taking them into its cache.
    """
    kept = () if "DVC_STAGE" in os.environ else ("out",)
    for name in ("checkpoints", "hidden", *kept):
        shutil.rmtree(run.folder / name, ignore_errors=True)
    keep = {run.folder, *tracking.waiting(run.root, run.node.name)}
    for folder in run.folder.parent.iterdir():
        if folder not in keep:
            shutil.rmtree(folder)


def forget_committed(root: Path) -> None:
    """Delete the launcher's own links to outputs that DVC has in its cache by now."""
    for node in fingerprint.read_graph(root).values():
        for published in root.glob(f"runs/{node.name}/*/PUBLISHED"):
            if is_committed(published.parent, root, node):
                shutil.rmtree(published.parent / "out", ignore_errors=True)


def is_committed(folder: Path, root: Path, node: fingerprint.Node) -> bool:
    """Whether dvc.lock names the metrics of this run: DVC writes it when everything of the stage is in its cache."""
    results = {path: folder / "results" / path for path in (*node.metrics, *node.plots)}
    locked = fingerprint.locked(root, node.name)
    return all(file.exists() and locked.get(path) == fingerprint.md5(file) for path, file in results.items())
