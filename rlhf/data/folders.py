"""A folder of data files: which of them are rows, and of which split; nothing in it is passed over unsaid."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath

from rlhf.errors import UserError

# as the `datasets` library reads names; a file that names no split is of train
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
}
_SPLIT = {word: split for split, words in _WORDS.items() for word in words}
# of a shard, as hubs name them: train_sft-00000-of-00003.parquet
_SHARD = re.compile(rf"(?:^|[-.])((?:{'|'.join(_SPLIT)})_\w+)-\d+-of-\d+")
# what lies beside data and is none: notes, scripts, descriptions
_BESIDE = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|checksums)(\.(txt|cff))?|.*\.(md|rst|py|ya?ml|toml|sha256|md5|lock|dvc|jpe?g|png|svg)"
    r"|dataset_infos?\.json|_success|thumbs\.db",
    re.IGNORECASE,
)
_OF_DATASETS = ("dataset_dict.json", "state.json")


def of_datasets(folder: Path) -> bool:
    """Whether the `datasets` library wrote this folder."""
    return any((folder / name).exists() for name in _OF_DATASETS)


def split_of(path: PurePath) -> str:
    """The split that a file's name tells, or else the nearest folder's above it; train where none does."""
    if shard := _SHARD.search(path.name):
        return shard[1]
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT:
                return _SPLIT[word]
    return "train"


def files_of(folder: Path, endings: tuple[str, ...], key: str) -> list[PurePath]:
    """The data files of a folder and its subfolders, relative to it, in the order of their names.

    Args:
        endings: of data files, in small letters.
        key: of the source, for messages.

    Raises:
        UserError: there is none, or something stands there that would have to be passed over.
    """
    found: list[PurePath] = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in folders:
            _check_folder(Path(top) / name, key)
        for name in names:
            path = (Path(top) / name).relative_to(folder)
            if name.lower().endswith(endings) and not _BESIDE.fullmatch(name):
                found.append(path)
            elif not name.startswith(".") and not _BESIDE.fullmatch(name):
                raise UserError(
                    f"{key}.path: {folder} holds {path}, which is no kind of data file that can be read",
                    remedy=f"take it out of the folder, or turn it into a file that ends in {_kinds(endings)}",
                )
    if not found:
        raise UserError(
            f"{key}.path: {folder} is no folder of `datasets` and holds no data file",
            remedy=f"give a folder written by Dataset.save_to_disk, or one of files that end in {_kinds(endings)}",
        )
    return sorted(found)


def _kinds(endings: tuple[str, ...]) -> str:
    """The endings of data files, but for those of packed ones."""
    return ", ".join(ending for ending in endings if ending.count(".") == 1)


def _check_folder(folder: Path, key: str) -> None:
    if of_datasets(folder):
        raise UserError(f"{key}.path: {folder} is a folder of `datasets` in a folder of files", remedy="give it a source of its own")
    if folder.is_symlink():
        raise UserError(f"{key}.path: {folder} is a link to a folder", remedy="put the files there themselves")


def of_split(files: list[PurePath], split: str | None, where: Path, key: str) -> list[PurePath]:
    """Those files that are of a split; all of them where no split is asked for and they are of one.

    Raises:
        UserError: they are of several splits and none is asked for, or none of them is of the one that is.
    """
    splits: dict[str, list[PurePath]] = {}
    for file in files:
        splits.setdefault(split_of(file), []).append(file)
    if split is None and len(splits) == 1:
        return files
    wanted = _SPLIT.get(split.lower(), split) if split is not None else None
    if wanted not in splits:
        raise UserError(
            f"{key}.hub_split is {'not set' if split is None else repr(split)}, but {where} has the splits {_listed(splits)}",
            remedy=f"set {key}.hub_split to one of them in params.yaml; a file of no split in its name is of train",
        )
    return splits[wanted]


def _listed(splits: Mapping[str, list[PurePath]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, files[:3]))}{', …' if files[3:] else ''})" for name, files in sorted(splits.items()))
