"""A base model that is given as a folder: that it is there, and apart from what stages write."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf import config
from rlhf.errors import UserError
from rlhf.workspace import fingerprint


def check_base(root: Path, stage: str, params: config.Params) -> None:
    """Check that a model given as a folder is there.

    Raises:
        UserError: it is not.
    """
    base = params.base
    if stage != "base" or base.source != "pretrained" or (root / base.model).is_dir():
        return
    key, remedy = f"params.yaml: base.model {base.model}", "give the folder of a Hugging Face model, or a hub id"
    if os.path.lexists(root / base.model):
        raise UserError(f"{key} is a file, or a link that leads nowhere, and no folder", remedy=remedy)
    # a hub id is NAME or OWNER/NAME; anything else can only be a folder
    if base.model.startswith((".", "/", "~")) or base.model.count("/") > 1:
        home = " (~ is not read as your home: write the path out)" if base.model.startswith("~") else ""
        raise UserError(f"{key}: no such folder{home}", remedy=remedy)


def check_base_is_apart(root: Path, params: config.Params) -> None:
    """Check that a model given as a folder is none that stages write: it would be another one after each run.

    Raises:
        UserError: it is, or one that holds such folders.
    """
    base = params.base
    if base.source != "pretrained" or not (root / base.model).is_dir():
        return
    given, top = (root / base.model).resolve(), root.resolve()
    outputs = [path for node in fingerprint.read_graph(root).values() for path in node.outputs if path.startswith("models/")]
    for path in ("runs", *outputs):
        if given.is_relative_to(top / path) or (top / path).is_relative_to(given):
            what = f"params.yaml: base.model {base.model}: stages write {path} there, and it would be another model after each run"
            raise UserError(what, remedy="copy the model to a folder of its own (cp -rL), and name that one")
