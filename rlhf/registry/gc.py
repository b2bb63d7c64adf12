"""`rlhf gc`: removes what no run goes on from and no registered version, branch or tag needs.

    scratch   under runs/: runs of a stage with other inputs or params than now, checkpoints of finished ones, comparisons of versions
              that are no more, what a kill left of `rlhf verify` and of registration
    data      in the DVC cache: what neither the workspace nor a branch, a tag, or the commit of a registered version names. This is the
              question that `dvc gc --workspace --all-branches --all-tags --all-experiments` asks; remotes are never touched
    MLflow    in the workspace's own database: files of models that no registered version refers to, and of runs that were deleted

It works alone: no flow, stage, comparison or `rlhf verify` runs beside it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo

from rlhf import tracking
from rlhf.config import STAGES, Params, kind
from rlhf.launcher import launch
from rlhf.locks import lock
from rlhf.registry import comparison, unused
from rlhf.registry.versions import Version, of_all_models, versions
from rlhf.workspace import fingerprint, snapshot

# what `rlhf verify` and registration make under runs/ and take away again
TEMPORARY = ("verify-*", "register-*")


@dataclass(frozen=True)
class Leftover:
    """Files and folders that may go, what they are, and why nothing needs them."""

    what: str
    why: str
    paths: tuple[Path, ...]
    model: str | None = None  # id in MLflow of the model that they are the files of


@dataclass(frozen=True)
class Found:
    """What may go, and what is to be said besides."""

    leftovers: list[Leftover]
    notes: list[str]


@contextmanager
def alone(root: Path, params: Params) -> Iterator[None]:
    """Hold everything that works in this workspace.

    Raises:
        UserError: something does; a flow is waited for where params say so (operations.when_busy).
    """
    with ExitStack() as held:
        waits = params.operations.when_busy == "queue"
        held.enter_context(lock(root, "flow", refuse=None if waits else f"{root}: a retraining flow is running in this workspace"))
        for name in (*_stages(root), "compare", "verify"):
            held.enter_context(lock(root, name, refuse=f"{name} is running in this workspace"))
        for folder in sorted((root / "runs/sweeps").glob("*")):  # what they share is in DVC's cache alone
            held.enter_context(lock(root, f"sweep-{folder.name}", refuse=f"sweep {folder.name} is running in this workspace"))
        held.enter_context(lock(root, "registry"))
        yield


def find(root: Path, params: Params) -> Found:
    """What may go. Nothing is changed. Call it `alone`.

    Raises:
        UserError: dvc.yaml is wrong, or MLflow is away.
    """
    registered = _registered(root, params)
    data, notes = _data(root, registered)
    return Found([*_scratch(root, params, registered), *data, *_artifacts(root, params)], notes + _notes(root, params, registered))


def _registered(root: Path, params: Params) -> list[Version]:
    """The versions that this workspace has made, also under other names: each preset has its own."""
    others = [version for version in of_all_models(root, params) if version.model != params.promote.model]
    own = unused.is_own(root, params)
    return versions(root, params) + [version for version in others if own or snapshot.has(root, version.tags["git.revision"])]


def remove(root: Path, params: Params, leftovers: Sequence[Leftover]) -> None:
    """Remove what `find` found. Killed on the way, it can be done again."""
    for leftover in leftovers:
        if leftover.model:
            # first, so that MLflow never offers a model without its files
            unused.forget(leftover.model, root, params)
        for path in leftover.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def size(paths: Sequence[Path]) -> int:
    """Bytes of files and folders."""
    return sum(file.lstat().st_size for file in _files(paths))


def freed(paths: Sequence[Path]) -> int:
    """Bytes that the disk gets back once all of them are gone: a file that is linked elsewhere as well gives none."""
    entries = {}
    links: Counter[tuple[int, int]] = Counter()
    for file in set(_files(paths)):
        entry = file.lstat()
        entries[entry.st_dev, entry.st_ino] = entry
        links[entry.st_dev, entry.st_ino] += 1
    return sum(entry.st_size for key, entry in entries.items() if links[key] == entry.st_nlink)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            yield from (file for file in path.rglob("*") if file.is_symlink() or file.is_file())
        elif path.is_symlink() or path.exists():
            yield path


# ------------------------------------------------------------------------------------------------------------------ scratch


def _stages(root: Path) -> list[str]:
    """All stages, and those of the rounds that have run."""
    return [*STAGES, *sorted(folder.name for folder in (root / "runs").glob("*-*") if kind(folder.name) in STAGES)]


def _scratch(root: Path, params: Params, versions: Sequence[Version]) -> Iterator[Leftover]:
    runs = root / "runs"
    graph = fingerprint.read_graph(root)
    for stage in _stages(root):
        folders = [folder for folder in sorted((runs / stage).glob("*")) if folder.is_dir()]
        now = _fingerprint(root, params, graph[stage]) if folders and stage in graph else ""
        unsent = tracking.waiting(root, stage)
        for folder in folders:
            finished = (folder / "PUBLISHED").exists()
            # None: an input is missing, and what a run would go on from is not known
            if not finished and now in (None, folder.name):
                continue
            # of a finished run the launcher may keep links to outputs, until DVC has them; of an unsent one the metrics stay
            heavy = ("checkpoints", "hidden") if finished else ("out", "checkpoints", "hidden")
            paths = [folder / name for name in heavy if (folder / name).exists()] if finished or folder in unsent else [folder]
            if paths:
                why = "the stage is finished" if finished else "its params or inputs are others now"
                yield Leftover(f"scratch of {stage}, {folder.name}", why, tuple(paths))
    compared = {comparison.folder_of(one, other, root) for one in versions for other in versions if one.model == other.model}
    for folder in sorted((runs / "compare").glob("*")):
        if folder not in compared or not (folder / "FINISHED").exists():
            yield Leftover(f"comparison {folder.name}", "of a version that is no more, or cut off", (folder,))
    for pattern in TEMPORARY:
        for folder in sorted(runs.glob(pattern)):
            yield Leftover(f"runs/{folder.name}", "left by a process that was killed", (folder,))


def _fingerprint(root: Path, params: Params, node: fingerprint.Node) -> str | None:
    """The fingerprint that a run would have now; None where an input is missing."""
    if not all((root / path).exists() for path in node.inputs):
        return None
    return fingerprint.fingerprint(node.name, params.of_stage(node.name), launch.hash_inputs(root, params, node))


# --------------------------------------------------------------------------------------------------------------------- data


def _data(root: Path, versions: Sequence[Version]) -> tuple[list[Leftover], list[str]]:
    """Objects of the DVC cache that nothing names; or why that cannot be told, in which case all of them stay."""
    if snapshot.head(root) is None:
        return [], ["the DVC cache stays as it is: without a git commit nothing says what older versions need"]
    revisions = {version.tags["git.revision"]: version.number for version in versions if version.tags["git.revision"] != "none"}
    for revision, number in revisions.items():
        if not snapshot.has(root, revision):
            return [], [f"the DVC cache stays as it is: revision {revision} of version {number} is not here; bring it with `git fetch`"]
    # of revisions that no run has been committed to, it would warn that they name no data
    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        # silent: it would ask people whether a folder whose list is missing may be lost
        with Repo(str(root)) as repo, contextlib.redirect_stdout(io.StringIO()):
            cache = Path(repo.cache.local_cache_dir)
            if not cache.is_relative_to(root):
                return [], [f"the DVC cache stays as it is: {cache} is outside this workspace, and others may need what is in it"]
            named = repo.used_objs(all_branches=True, all_tags=True, all_experiments=True, revs=sorted(revisions))
            used = {item.value for objects in named.values() for item in objects}
            paths = {Path(odb.oid_to_path(oid)) for _, odb in repo.cache.by_scheme() if odb for oid in odb.all() if oid not in used}
    except DvcException as error:
        reason = " ".join(f"{error}: {error.__cause__}".split())
        return [], [f"the DVC cache stays as it is, as DVC cannot tell what is needed: {reason}; bring it with `dvc fetch -aT`"]
    why = "no version, branch, tag or file of the workspace names them"
    return [Leftover(f"{len(paths)} files of the DVC cache", why, tuple(paths))] if paths else [], []


# ------------------------------------------------------------------------------------------------------------------- MLflow


def _artifacts(root: Path, params: Params) -> Iterator[Leftover]:
    for model, folder in unused.models(root, params).items():
        yield Leftover(f"files of model {model}", "no registered version refers to it", (folder,), model)
    for run, folder in unused.runs(root, params).items():
        yield Leftover(f"files of run {run}", "the run was deleted in MLflow", (folder,))


def _notes(root: Path, params: Params, versions: Sequence[Version]) -> list[str]:
    notes = []
    if not unused.is_own(root, params):
        notes.append("MLflow's database is shared: its deleted runs and models are removed there, with `mlflow gc`")
    revisions = {f"{version.model}-v{version.number}": version.tags["git.revision"] for version in versions}
    if kept := snapshot.kept_for_nobody(root, params.promote.model, revisions):
        commands = [f"git tag -d {' '.join(kept.tags)}"] if kept.tags else []
        commands += [f"git branch -D {' '.join(kept.branches)}"] if kept.branches else []
        notes.append(f"tags and branches of versions that are no more keep their data; to give it up: {' && '.join(commands)}")
    return notes
