"""What a source points to, as numbered objects: files, folders of them, folders of `datasets` and hub datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

from rlhf.config.data import FileSource
from rlhf.data import files, folders
from rlhf.data.fields import Unparsed
from rlhf.errors import UserError
from rlhf.paths import inside

Reading = TypeVar("Reading", bound=FileSource)


def records_of(source: FileSource, key: str, root: Path) -> Unparsed:
    """The objects of a source, each with its line (JSON lines, CSV) or its number, from 1. Lines of JSON come as they are.

    What is not valid UTF-8 comes as lone surrogates.

    Args:
        source: an entry of data.sources.
        key: where it stands in params.yaml, for example ``data.sources.0``.
        root: what a relative path starts from.

    Raises:
        UserError: there is no such file, folder, split or hub dataset, or it is damaged or of an unknown kind.
    """
    if source.path is None:
        return _of_hub(source, key)
    inside(root, source.path, f"{key}.path")
    path = root / source.path
    if path.is_dir():
        return _of_folder(path, source.hub_split, key)
    if source.hub_split is not None and path.exists():
        folders.of_split([PurePath(path.name)], source.hub_split, path, key)
    return files.records_of_file(path, key)


def parts_of(source: Reading, key: str, root: Path) -> list[Reading]:
    """The files of a folder, of the split that is asked for, each as a source; none where the source is anything else."""
    path = root / source.path if source.path is not None else root
    if source.path is None or not path.is_dir() or folders.of_datasets(path):
        return []
    found = folders.of_split(folders.files_of(path, files.ENDINGS, key), source.hub_split, path, key)
    return [source.model_copy(update={"path": (PurePath(source.path) / part).as_posix(), "hub_split": None}) for part in found]


def _of_folder(path: Path, split: str | None, key: str) -> Unparsed:
    import datasets

    _check_names(path, key)
    try:
        content = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{key}.path: {path} is no folder of `datasets`: {what}", remedy="write it with Dataset.save_to_disk") from None
    yield from _numbered(_one_split(content, split, str(path), key), f"{key}.path: {path}")


def _check_names(folder: Path, key: str) -> None:
    """Check that a folder of `datasets` names files of its own only: the library opens whatever stands there.

    Raises:
        UserError: one leads out of the folder.
    """
    for listing in (path for name in ("dataset_dict.json", "state.json") for path in sorted(folder.rglob(name))):
        try:
            content = json.loads(listing.read_text(encoding="utf-8"))
            names = [*content.get("splits", []), *(entry["filename"] for entry in content.get("_data_files", []))]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{key}.path: {listing} cannot be read: {error!r}", remedy="write it with Dataset.save_to_disk") from None
        for name in names:
            inside(folder, listing.parent / str(name), f"{key}.path: {listing}")


def _of_hub(source: FileSource, key: str) -> Unparsed:
    import datasets

    try:
        content = datasets.load_dataset(source.hub, revision=source.revision, split=source.hub_split)
    except Exception as error:  # the hub's client raises errors of a dozen libraries
        what = " ".join(str(error).split())
        raise UserError(
            f"{key}.hub: '{source.hub}' (revision {source.revision}, split {source.hub_split}) cannot be loaded: {what}",
            remedy=f"check hub, revision and hub_split of {key} in params.yaml and the network, or give a file with {key}.path",
        ) from None
    yield from _numbered(_one_split(content, None, str(source.hub), key), f"{key}.hub: {source.hub}")


def _numbered(rows: Iterable[Mapping[str, Any]], where: str) -> Unparsed:
    try:
        yield from enumerate(rows, start=1)
    except Exception as error:  # as above: each kind of column has a library of its own that decodes it
        what = " ".join(str(error).split())
        raise UserError(f"{where} cannot be read: {what}", remedy="write its rows to a JSONL file, and give its path") from None


def _one_split(content: Any, split: str | None, name: str, key: str) -> Iterable[Mapping[str, Any]]:
    splits = content if isinstance(content, dict) else {str(content.split or split): content}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise UserError(
            f"{key}.hub_split is {'not set' if split is None else repr(split)}, but {name} has the splits {', '.join(splits)}",
            remedy=f"set {key}.hub_split to one of them in params.yaml",
        )
    return splits[split]
