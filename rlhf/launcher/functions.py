"""Files of reward functions: a run reads copies of them, so that an edit changes no run under way; what differs in the end is told."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.errors import UserError
from rlhf.workspace.fingerprint import differences, hash_inputs

FOLDER = "functions"  # of the run; the stage knows it as `Job.functions`


def keep(root: Path, files: Sequence[str], inputs: Mapping[str, str], folder: Path) -> None:
    """Copy the files into a run's folder.

    Args:
        inputs: the hashes that the run is known by.

    Raises:
        UserError: a file is another one by now.
    """
    for file in files:
        copy = folder / FOLDER / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, copy)
    if edited := differences({file: inputs[file] for file in files}, hash_inputs(folder / FOLDER, files)):
        raise UserError(f"{', '.join(edited)} was edited just as the stage began", remedy="run it again")


def check(root: Path, files: Sequence[str], inputs: Mapping[str, str], stage: str, folder: Path) -> None:
    """Check, before a run is published, that the files are what it was trained by: dvc.lock would name what stands there now.

    Raises:
        UserError: they were edited meanwhile.
    """
    if edited := differences({file: inputs[file] for file in files}, hash_inputs(root, files)):
        raise UserError(
            f"{', '.join(edited)} was edited while stage {stage} ran, which went on by what it was: nothing was published",
            remedy="run it again, and it trains by what stands there now; or copy back what it was, from "
            f"{folder / FOLDER}, and what was trained is published at once",
        )
