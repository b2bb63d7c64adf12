"""Where the command line works, and where a workspace keeps what outlives it."""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import UserError

EXPERIMENTS = Path(".dvc/tmp/exps")
OF_SWEEP = "sweep-"  # how the name of a sweep's folder among them begins, of which DVC knows nothing


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


def home(root: Path) -> Path:
    """The workspace itself; of a folder that DVC makes for a queued or temporary experiment, and deletes, the one that it is made of."""
    if place := _experiments(root):
        top = next(folder for folder in (root, *root.parents) if (folder / ".dvc").is_dir())
        return place.parents[2] / root.relative_to(top)
    return root


def is_deleted(path: Path) -> bool:
    """Whether DVC deletes a path as soon as the command there has ended: it lies in the folder of a queued or temporary experiment."""
    place = _experiments(path)
    return place is not None and not path.relative_to(place).parts[0].startswith(OF_SWEEP)


def _experiments(path: Path) -> Path | None:
    """Where the folders of experiments are, of which the path lies in one; None where it does not."""
    return next((place for place in path.parents if place.parts[-3:] == EXPERIMENTS.parts), None)


def refuse_experiment(root: Path) -> None:
    """Check that the workspace is none of DVC's temporary folders: a version that is registered there would be of files that go.

    Raises:
        UserError: it is.
    """
    if home(root) != root:
        what = f"{root}: the temporary folder of a DVC experiment, from which nothing is registered"
        raise UserError(what, remedy=f"in {home(root)}: `dvc exp apply NAME`, then `rlhf run`")
