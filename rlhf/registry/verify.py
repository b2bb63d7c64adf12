"""Whether a version can be had again: a fresh checkout of its revision, its data from DVC, nothing to do, and the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from rlhf.config import Params
from rlhf.documents import load_yaml
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.registry.registration import weights_hash
from rlhf.registry.versions import Version, model_folder
from rlhf.workspace import fingerprint, snapshot

Files = dict[str, str]  # path in the workspace → MD5
Say = Callable[[str], Any]


def verify(version: Version, root: Path, params: Params, *, retrain: bool, say: Say) -> None:
    """Verify a version, telling each step.

    Args:
        version: to verify.
        root: the workspace; it stays as it is.
        params: of the workspace.
        retrain: train everything again as well, and compare all bytes.
        say: takes a line per step.

    Raises:
        UserError: names each file that is missing or has other bytes, or what is not up to date.
    """
    revision = version.tags["git.revision"]
    if revision == "none":
        what = f"version {version.number} has no git revision: it was registered outside a git repository"
        raise UserError(what, remedy="run `git init` there before the next version is made")
    # on the same disk as the DVC cache, where links to it work; `rlhf gc` takes nothing away meanwhile
    with lock(root, "verify"), tempfile.TemporaryDirectory(dir=root / "runs", prefix="verify-") as scratch:
        fresh = snapshot.checkout(root, revision, Path(scratch) / "checkout")
        say(f"checked out {revision}")
        cached, plain = _outputs(fresh)
        with _opened(fresh, root, Path(scratch)) as repo:
            if repo.config["core"].get("remote"):
                repo.fetch()
            files = _check_cache(Path(repo.cache.local_cache_dir), cached)
            repo.checkout()
            _refuse([f"{path} is not the file that the run wrote" for path, md5 in plain.items() if _md5(fresh / path) != md5], version)
            say(f"{len(files)} files of {len(cached)} outputs have the hashes that dvc.lock names")
            _refuse([f"{stage} is not up to date: {json.dumps(why)}" for stage, why in repo.status().items()], version)
        would = [line for line in _repro(fresh, Path(scratch), "--dry").splitlines() if line.startswith("Running")]
        _refuse([f"`dvc repro` would do something: {line}" for line in would], version)
        say("`dvc status` and `dvc repro --dry` have nothing to do")
        _check_model(fresh, version)
        model_folder(version.uri, root, params)
        say(f"models/{version.tags['algorithm']} has the hash of the registry, whose own files are as they were registered")
        if retrain:
            say("training again …")
            _repro(fresh, Path(scratch), "--force", "--no-run-cache", "--no-commit")
            outputs = {path: md5 for path, md5 in files.items() if not path.startswith("data/raw/")} | plain
            _refuse([f"{path} has other bytes after training again" for path, md5 in outputs.items() if _md5(fresh / path) != md5], version)
            say(f"trained again, all {len(outputs)} files have the same bytes")


@contextmanager
def _opened(fresh: Path, root: Path, scratch: Path) -> Iterator[Repo]:
    """DVC in the fresh checkout, with the workspace's cache and settings of remotes, and no memory of files seen before."""
    with Repo(str(root)) as own:
        cache = own.cache.local_cache_dir
    local = root / ".dvc" / "config.local"
    if local.exists():
        shutil.copy(local, fresh / ".dvc" / "config.local")
    try:
        with Repo(str(fresh)) as repo, repo.config.edit("local") as settings:
            settings.setdefault("cache", {})["dir"] = cache
        with Repo(str(fresh), config={"core": {"site_cache_dir": str(scratch / "site")}}) as repo:
            yield repo
    except DvcException as error:
        raise UserError(
            f"DVC in a fresh checkout: {' '.join(str(error).split())}", remedy="bring the missing data with `dvc pull`"
        ) from None


def _repro(fresh: Path, scratch: Path, *options: str) -> str:
    """`dvc repro` with the code of the checkout; what it printed."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RLHF_", "DVC_"))}
    programs = Path(sys.executable).parent
    own = {
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(fresh),
        "DVC_NO_ANALYTICS": "true",
        "DVC_SITE_CACHE_DIR": str(scratch / "site"),
    }
    words = [str(programs / "dvc"), "repro", *options]
    done = subprocess.run(words, cwd=fresh, env=outside | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        what = " | ".join(done.stdout.splitlines()[-8:])
        raise UserError(f"`dvc repro {' '.join(options)}` failed in a fresh checkout: {what}", remedy="see there why")
    return done.stdout


def _outputs(folder: Path) -> tuple[Files, Files]:
    """What the revision names, by path: outputs and raw data in the DVC cache; metrics and plots, some of which are in git."""
    graph = fingerprint.read_graph(folder)
    locked = load_yaml((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    entries = {out["path"]: out["md5"] for name in graph if name in locked for out in locked[name].get("outs", [])}
    plain = {path: entries.pop(path) for node in graph.values() for path in (*node.metrics, *node.plots) if path in entries}
    for place in sorted((folder / "data" / "raw").rglob("*.dvc")):
        for out in load_yaml(place.read_text(encoding="utf-8"))["outs"]:
            entries[(place.parent / out["path"]).relative_to(folder).as_posix()] = out["md5"]
    return entries, plain


def _check_cache(cache: Path, outputs: Files) -> Files:
    """Hash every file of the outputs in the cache: DVC itself trusts those that are read-only. Returns the files, a folder's one by one."""
    files: dict[str, str] = {}
    wrong: list[str] = []
    for path, md5 in outputs.items():
        for file, digest, is_list in _objects(cache, path, md5):
            found = _md5(_place(cache, digest))
            if found is None:
                wrong.append(f"{file} is missing in the DVC cache ({_place(cache, digest)})")
            elif found != digest.removesuffix(".dir"):
                wrong.append(f"{file} has other bytes in the DVC cache ({_place(cache, digest)})")
            elif not is_list:
                files[file] = digest
    _refuse(wrong, None)
    return files


def _objects(cache: Path, path: str, md5: str) -> Iterator[tuple[str, str, bool]]:
    """The objects that make up an output: path, hash, and whether it is the list of a folder."""
    yield path, md5, md5.endswith(".dir")
    if md5.endswith(".dir") and _md5(_place(cache, md5)) == md5.removesuffix(".dir"):
        for entry in json.loads(_place(cache, md5).read_text(encoding="utf-8")):
            yield f"{path}/{entry['relpath']}", entry["md5"], False


def _place(cache: Path, md5: str) -> Path:
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def _md5(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _check_model(folder: Path, version: Version) -> None:
    name = f"models/{version.tags['algorithm']}"
    if weights_hash(folder / name) != version.tags["sha256"]:
        _refuse([f"{name} has other weights than the registry"], version)


def _refuse(wrong: list[str], version: Version | None) -> None:
    if wrong:
        remedy = "bring back the right file (`dvc fetch` from a remote, or a backup); a version cannot be had again without it"
        raise UserError(f"{f'version {version.number}: ' if version else ''}{'; '.join(wrong)}", remedy=remedy)
