"""What a version was trained from, as a commit of its own: on a branch per run, with a tag per version.

It is made in an index of its own, so that the user's branch, index and files stay as they are. Changes that were not committed are in
it, as the run has used them: tracked files as they lie there, and untracked ones that the graph reads or writes.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rlhf.errors import UserError
from rlhf.workspace import fingerprint

BRANCHES = "refs/heads/rlhf/"
ALWAYS = ("params.yaml", "dvc.yaml", "dvc.lock", "data/raw")
RESULTS = ("metrics", "plots")
AUTHOR = {
    f"GIT_{role}_{part}": value for role in ("AUTHOR", "COMMITTER") for part, value in (("NAME", "rlhf"), ("EMAIL", "rlhf@localhost"))
}


def head(root: Path) -> str | None:
    """The commit that is checked out; None outside a git repository, and before its first commit."""
    return _git(root, "rev-parse", "--quiet", "--verify", "HEAD^{commit}", check=False) or None


def changed(root: Path, *paths: str) -> bool:
    """Whether any of these paths differs from the commit that is checked out."""
    return bool(_git(root, "status", "--porcelain", "--", *paths, check=False))


def uncommitted(root: Path) -> list[str]:
    """What of a run the user's branch does not hold as it is now: values, graph, data and numbers. Empty outside a git repository."""
    return [path for path in (*ALWAYS, *RESULTS) if changed(root, path)]


def commit(root: Path, message: str) -> str | None:
    """Commit the workspace as it stands to a new branch rlhf/TIME; the revision, None outside a git repository.

    Where a commit holds just this already (HEAD, or one of an earlier run), that one is returned.
    """
    if not _git(root, "rev-parse", "--git-dir", check=False):
        return None
    parent = head(root)
    found = tree(root)
    known = [parent] if parent else []
    known += _git(root, "for-each-ref", "--format=%(objectname)", BRANCHES).split()
    for revision in known:
        if _git(root, "rev-parse", f"{revision}^{{tree}}") == found:
            return revision
    made = _commit(root, found, parent, message)
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{made[:8]}"
    _git(root, "update-ref", f"{BRANCHES}{name}", made)
    return made


def keep(root: Path, reference: str, message: str) -> str:
    """Commit the workspace as it stands, held by a reference of that name alone: no branch, no tag. The revision."""
    parent = head(root)
    made = _commit(root, tree(root), parent, message)
    _git(root, "update-ref", reference, made)
    return made


def publish(folder: Path, parent: str, message: str, root: Path, reference: str) -> str:
    """Commit a checkout as it stands, as a child of `parent`, and hold it by a reference in the repository of `root`. The revision."""
    made = _commit(folder, tree(folder), parent, message)
    _git(folder, "push", "--quiet", "--force", _git(root, "rev-parse", "--show-toplevel"), f"{made}:{reference}")
    return made


def _commit(root: Path, content: str, parent: str | None, message: str) -> str:
    return _git(root, "commit-tree", content, *(["-p", parent] if parent else []), "-m", message, environment=AUTHOR)


def tree(root: Path) -> str:
    """The workspace as it stands, as git's tree, by an index of its own: tracked files, and others that the graph reads or writes."""
    parent = head(root)
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        if parent:
            _git(root, "read-tree", parent, environment=index)
        _git(root, "add", "--update", "--", ".", environment=index)
        graph = fingerprint.read_graph(root)
        used = {path for node in graph.values() for path in (*node.inputs, *node.metrics, *node.plots)}
        there = [path for path in sorted({*ALWAYS, *used}) if (root / path).exists()]
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *there, environment=index)
        _git(root, "update-index", "--add", "-z", "--stdin", stdin=new, environment=index)
        return _git(root, "write-tree", environment=index)


def tag(root: Path, name: str, revision: str) -> None:
    """Set a tag; one that is there already stays."""
    if not _git(root, "rev-parse", "--quiet", "--verify", f"refs/tags/{name}", check=False):
        _git(root, "update-ref", f"refs/tags/{name}", revision)


def has(root: Path, revision: str) -> bool:
    """Whether this repository has a revision."""
    return bool(_git(root, "rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}", check=False))


def differing(root: Path, old: str, new: str, *paths: str) -> list[str]:
    """The files below some paths that differ between two revisions, each with the lines added and removed."""
    listed = _git(root, "diff", "--numstat", "--relative", old, new, "--", *paths).splitlines()
    return [f"{path}: +{added} −{removed}" for added, removed, path in (line.split("\t", 2) for line in listed)]


def titles(root: Path, old: str, new: str) -> list[str]:
    """The commits of the user that one revision has and another has not, newest first."""
    return _git(root, "log", "--format=%h %s", f"{old}..{new}", check=False).splitlines()


def experiments(head: str) -> str:
    """Where DVC keeps the experiments of a commit."""
    return f"refs/exps/{head[:2]}/{head[2:]}"


def titled(root: Path, references: str) -> list[tuple[str, str]]:
    """The references below a place, by the last part of their names, each with the title of its commit."""
    listed = _git(root, "for-each-ref", "--format=%(refname) %(subject)", references).splitlines()
    return [(name.rpartition("/")[2], title) for name, _, title in (line.partition(" ") for line in listed)]


@dataclass(frozen=True)
class Names:
    """Tags and branches, by their short names."""

    tags: list[str]
    branches: list[str]

    def __bool__(self) -> bool:
        return bool(self.tags or self.branches)


def kept_for_nobody(root: Path, model: str, revisions: Mapping[str, str]) -> Names:
    """Tags of versions and branches of runs that are there though their version is not.

    Args:
        model: name of the registered model whose tags are looked at.
        revisions: of its versions, and of other models', by tag.
    """
    tags = _git(root, "for-each-ref", "--format=%(refname:lstrip=2)", f"refs/tags/{model}-v*", check=False).split()
    listed = _git(root, "for-each-ref", "--format=%(objectname) %(refname:lstrip=2)", BRANCHES, check=False).splitlines()
    branches = [line.split() for line in listed]
    return Names(
        [tag for tag in tags if tag not in revisions and tag.removeprefix(f"{model}-v").isdecimal()],
        [name for commit, name in branches if commit not in revisions.values()],
    )


def checkout(root: Path, revision: str, folder: Path) -> Path:
    """A fresh checkout of a revision in a new folder; the workspace in it.

    Raises:
        UserError: this repository does not have the revision.
    """
    if not has(root, revision):
        raise UserError(f"git revision {revision} is not in {root}", remedy="bring it with `git fetch`, then repeat this")
    top = _git(root, "rev-parse", "--show-toplevel")
    # shares the objects and copies none; nothing is entered in the user's repository, as it would be for a worktree
    _git(root, "clone", "--quiet", "--shared", "--no-checkout", top, str(folder))
    _git(folder, "checkout", "--quiet", "--detach", revision)
    return folder / prefix(root)


def prefix(root: Path) -> str:
    """Where in its repository a workspace lies; empty, and its top, where it is all of it."""
    return _git(root, "rev-parse", "--show-prefix")


def restore(root: Path, revision: str, kept: Sequence[str]) -> None:
    """Have a checkout as a revision has it, all files that are not of it deleted, but for `kept`, whatever a kill has left there."""
    Path(_git(root, "rev-parse", "--absolute-git-dir"), "index.lock").unlink(missing_ok=True)
    _git(root, "reset", "--quiet", "--hard", revision)
    _git(root, "clean", "--quiet", "-dfx", *(f"--exclude=/{prefix(root)}{path}" for path in kept))


def forget(root: Path, reference: str) -> None:
    """Delete a reference, where it is there."""
    _git(root, "update-ref", "-d", reference)


def _git(root: Path, *words: str, check: bool = True, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        ["git", *words],
        cwd=root,
        env=os.environ | (environment or {}),
        input=stdin,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    if check and done.returncode:
        raise UserError(f"`git {words[0]}` failed in {root}: {' '.join(done.stderr.split())}", remedy="see to that, then run again")
    return done.stdout.strip() if done.returncode == 0 else ""
