"""Whether the folder of a given model still holds what stage base pinned: dvc.yaml cannot name it, so that DVC sees no change there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rlhf.config import Params
from rlhf.config.training import PretrainedBase
from rlhf.errors import UserError
from rlhf.workspace import fingerprint

PINNED = "models/base"
WEIGHTS, OTHERS = ".safetensors", {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
BLOCKS, BLOCK = 256, 4096  # of a file of weights: all of it would take longer than the whole check


def check(root: Path, params: Params) -> None:
    """Hold the folder against the record of models/base. Of weights the size and samples from end to end are compared.

    Raises:
        UserError: names the files that are other ones.
    """
    base = params.base
    try:
        lineage = json.loads((root / PINNED / fingerprint.LINEAGE).read_text(encoding="utf-8"))
        inputs, values = dict(lineage["inputs"]), lineage["params"]["base"]
    except (OSError, ValueError, TypeError, KeyError):  # nothing is pinned, or what is cannot be known
        return
    if not isinstance(base, PretrainedBase) or base.model_dump(mode="json") != values:
        return  # the stage runs anew
    before = {name: digest for name, digest in inputs.items() if Path(name).parent == Path(base.model)}
    try:
        files = [file for file in sorted((root / base.model).iterdir()) if file.is_file() and file.suffix in {WEIGHTS, *OTHERS}]
    except OSError:
        return  # it may be gone: models/base stands for it
    changed = [file.name for file in files if not _is_same(file, before.get(str(Path(base.model) / file.name)), root / PINNED)]
    if before and files and changed:
        what = f"base.model '{base.model}': {', '.join(changed[:3])}{' and more' if changed[3:] else ''} changed since stage base pinned it"
        remedy = "give another model in a folder of its own; or `dvc repro --force --single-item base` pins this one anew, then run again"
        raise UserError(f"{what}, and the stages start from {PINNED}", remedy=remedy)


def _is_same(file: Path, digest: str | None, pinned: Path) -> bool:
    if file.suffix != WEIGHTS:
        return fingerprint.hash_inputs(file.parent, [file.name])[file.name] == digest
    copy = pinned / file.name  # byte by byte
    return not copy.is_file() or (copy.stat().st_size == file.stat().st_size and list(_samples(copy)) == list(_samples(file)))


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek(max(size - BLOCK, 0) * number // (BLOCKS - 1))
            yield file.read(BLOCK)
