"""Where the command line works."""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import UserError


def workspace() -> Path:
    """The nearest folder, from the current one upwards, that holds params.yaml and dvc.yaml.

    Raises:
        UserError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and ((folder / "params.yaml").is_file() or (folder / "presets").is_dir()):
            return folder
    raise UserError(f"{here}: no workspace (a folder with params.yaml and dvc.yaml) here or above", remedy="change to the project's folder")
