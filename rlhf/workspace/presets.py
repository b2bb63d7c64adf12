"""`rlhf use`: a preset with overrides becomes params.yaml, its algorithm's graph dvc.yaml, and its data files come into the workspace.

A preset is a whole params.yaml, not an overlay: what a run uses is read in one place.
"""

from __future__ import annotations

import difflib
import filecmp
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.util import load_yaml_guess_indent

from rlhf import config
from rlhf.config import algorithms
from rlhf.config.data import FileSource
from rlhf.errors import UserError
from rlhf.paths import check_links, inside
from rlhf.workspace import dag, precision, upgrade

RAW = Path("data/raw")


def names(root: Path) -> list[str]:
    """The presets that the workspace has."""
    return sorted(path.stem for path in (root / "presets").glob("*.yaml"))


def use(
    root: Path, preset: str, overrides: list[str], bring: Callable[[config.Params], list[str]] = lambda _: [], fill: str | None = None
) -> list[str]:
    """Write params.yaml from a preset, by name or as a YAML file, and `key=value` overrides; and dvc.yaml for its algorithm.

    Nothing is written unless all is right.

    Args:
        fill: another preset, which gives the keys that this one lacks.
        bring: called with the params before anything is written, for what else they name; what it did, in lines.

    Returns:
        What was done, in lines for people.

    Raises:
        UserError: unknown preset or key, a value out of bounds, a data file that does not exist, or one that DVC refuses.
    """
    text, origin = _read(root, preset)
    raw, editor = _open(text, origin)
    done = []
    if fill:
        done += upgrade.fill(raw, _open(*_read(root, fill))[0], lambda: config.text.parse(_text(raw, editor), origin), _shown)
    done += _override(raw, overrides, origin)
    changed = bool(done)
    if _at(raw, "launch.precision") == precision.AUTO:
        found, why = precision.best(built=_at(raw, "base.source") == "build")
        done.append(f"{_set(raw, 'launch.precision', found, origin)} ({why})")
        changed = True
    try:
        params = config.validate(config.text.parse(_text(raw, editor), origin), origin)
    except UserError as error:
        remedy = f"give it as `rlhf use {preset} KEY=VALUE`; docs/params.md explains every key"
        if "is missing" in error.what and not fill:
            remedy += "; if it is of an earlier version, add `--fill PRESET`, the preset that it was made from"
        raise UserError(error.what, remedy=remedy) from None
    stages = dag.text(root, params)
    done += bring(params)
    folders: list[Path] = []
    for number, source in enumerate(params.data.sources):
        if isinstance(source, FileSource) and source.path is not None:
            place, lines = _bring(root, f"data.sources.{number}.path", source.path, source.name)
            raw["data"]["sources"][number]["path"] = place
            changed = changed or place != source.path
            done += lines
            folders.append(RAW / Path(place).relative_to(RAW).parts[0])
    done += [version(root, folder) for folder in dict.fromkeys(folders)]
    dvc = root / "dvc.yaml"
    if not dvc.is_file() or dvc.read_text(encoding="utf-8") != stages:
        _write(dvc, stages)
        done.append(f"wrote dvc.yaml for algorithm {params.algorithm}")
    _write(root / "params.yaml", _text(raw, editor) if changed else text)
    doubt = precision.doubt(params.launch)
    return [*done, f"wrote params.yaml from {origin}", *([f"note: {doubt}"] if doubt else [])]


def _read(root: Path, preset: str) -> tuple[str, str]:
    """The text of a preset, by name or as a YAML file, and what it is called in errors."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else root / "presets" / f"{preset}.yaml"
    if not path.is_file():
        raise UserError(
            f"unknown preset '{preset}'{_nearest(preset, names(root))}", remedy=f"use one of {', '.join(names(root))}, or a YAML file"
        )
    config.read(path)  # that it is YAML
    return path.read_text(encoding="utf-8"), str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def with_values(text: str, overrides: Sequence[str], origin: str) -> tuple[str, config.Params]:
    """The text of a params.yaml with `key=value` overrides, and what it says; nothing is written, no data is brought.

    Args:
        text: of the params.yaml.
        overrides: the changes.
        origin: names the values in errors.

    Raises:
        UserError: unknown key, or a value out of bounds.
    """
    raw, editor = _open(text, origin)
    _override(raw, overrides, origin)
    changed = _text(raw, editor) if overrides else text
    return changed, config.validate(config.text.parse(changed, origin), origin)


def _override(raw: Any, overrides: Sequence[str], origin: str) -> list[str]:
    """Set `key=value` overrides; the changes, for people."""
    done = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not of the form section.key=value", remedy="for example `seed=7` or `ppo.kl.coefficient=0.1`")
        done.append(_set(raw, key, _parse(value), origin))
        if key == "algorithm":
            done += _set_all(raw, "grpo", value, origin)
    return done


def _open(text: str, origin: str) -> tuple[Any, YAML]:
    """The content with its comments, and what writes it again in the layout that it has."""
    editor = YAML()
    editor.default_flow_style = False  # as DVC has it: what is new goes into lines of its own
    editor.width = sys.maxsize
    editor.preserve_quotes = True
    if ": null" in text:
        editor.Representer = _Nulls
    try:
        raw, indent, dash = load_yaml_guess_indent(text, yaml=editor)
    except YAMLError as error:
        raise UserError(f"{origin}: {' '.join(str(error).split())}", remedy=f"correct {origin}, or `rlhf use PRESET`") from None
    nested = re.search(r"^ +", text, re.MULTILINE)
    editor.indent(mapping=len(nested[0]) if nested else None, sequence=indent if dash is not None else None, offset=dash)
    return raw, editor


class _Nulls(RoundTripRepresenter):
    """Writes null as a word. Where no null is one, as in DVC's layout, the place of the value stays empty."""


_Nulls.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


def _text(raw: Any, editor: YAML) -> str:
    stream = io.StringIO()
    editor.dump(raw, stream)
    return stream.getvalue()


def _set(raw: Any, key: str, value: object, origin: str) -> str:
    """Set a dotted key; a number is a place in a list. The schema decides which keys there are, but for those of a mapping that it leaves
    open, as options of a reward function.

    Returns:
        The change, for people.
    """
    holder, is_open = raw, False
    models: list[type[BaseModel]] = [config.Params]
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or origin
        if isinstance(holder, list):
            if part == str(len(holder)) and depth == len(parts) - 1:  # one more
                holder.append(None)
            if not (part.isdecimal() and int(part) < len(holder)):
                raise UserError(
                    f"unknown key '{key}': {where} has {len(holder)} entries", remedy=f"give a number from 0 to {len(holder) - 1}"
                )
            place: Any = int(part)
        elif isinstance(holder, CommentedMap):
            known = [(field.alias or name, field) for model in models for name, field in model.model_fields.items()]
            if part not in dict(known) and not is_open:
                raise UserError(f"unknown key '{key}'{_nearest(part, list(dict(known)))}", remedy="see docs/params.md for every key")
            place = part
            annotations = [field.annotation for name, field in known if name == part]
            is_open = is_open or any(get_origin(annotation) is dict for annotation in annotations)
            models = [inner for annotation in annotations for inner in _models(annotation)]
            if part not in holder:  # not the last one, which holds the empty line or the comment after the section
                holder.insert(max(len(holder) - 1, 0), part, None)
            if holder[part] is None and depth < len(parts) - 1:  # a section that is null, too, can be filled key by key
                holder[part] = CommentedMap()
        else:
            raise UserError(f"unknown key '{key}': {where} is not a section", remedy="see docs/params.md for every key")
        if depth < len(parts) - 1:
            holder = holder[place]
    old, holder[place] = holder[place], value
    if isinstance(old, CommentedMap | CommentedSeq) and old.fa.flow_style() and isinstance(value, dict | list):
        holder[place] = CommentedMap(value) if isinstance(value, dict) else CommentedSeq(value)
        holder[place].fa.set_flow_style()
    return f"{key} {_shown(old)} → {_shown(value)}"


def _set_all(raw: Any, section: str, algorithm: str, origin: str) -> list[str]:
    """Set what an algorithm's name stands for; the changes, for people."""
    if not isinstance(raw.get(section), CommentedMap):
        return []  # the schema says that it is missing
    wanted = {f"{section}.{key}": value for key, value in algorithms.values(algorithm, raw[section]).items()}
    return [_set(raw, key, value, origin) for key, value in wanted.items() if _at(raw, key) != value]


def _at(raw: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, CommentedMap) else None
    return raw


def _shown(value: object) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # it holds itself
        return str(value)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _parse(text: str) -> object:
    try:
        value = YAML().load(text)  # a number keeps the form that it was given in, 1.0e-4
        return YAML(typ="safe", pure=True).load(text) if isinstance(value, dict | list) else value
    except Exception:  # of tags that make no sense of what follows, whatever they stumble over: the schema refuses it
        return text


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean '{close[0]}'?" if close else ""


def _bring(root: Path, key: str, value: str, source: str) -> tuple[str, list[str]]:
    """Have a source's file or folder under data/raw; returns its path there and what was done."""
    given = Path(value).expanduser()
    found = next((path.resolve() for path in (given, root / given) if path.exists()), None)
    if found is None:
        raise UserError(f"{key}: no such file: '{value}'", remedy="give the path of a data file, relative to this folder or absolute")
    raw = inside(root, RAW, "the folder of raw data")
    done = []
    if not found.is_relative_to(raw):
        target = inside(raw, source, key) / found.name
        check_links(found, key)
        if not _same(found, target):
            _copy(found, target)
            done.append(f"copied {value} to {RAW / source / found.name}")
        found = target
    return str(RAW / found.relative_to(raw)), done


def _same(one: Path, other: Path) -> bool:
    if one.is_dir() and other.is_dir():
        files = [sorted(path.relative_to(top) for path in top.rglob("*") if path.is_file()) for top in (one, other)]
        return files[0] == files[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in files[0])
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _copy(origin: Path, target: Path) -> None:
    """Copy beside, then rename: DVC may have made the old file a link into its cache, which must not be written through."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        beside = Path(scratch) / target.name
        (shutil.copytree if origin.is_dir() else shutil.copyfile)(origin, beside)
        if target.is_dir():
            shutil.rmtree(target)
        beside.replace(target)


def version(root: Path, path: Path) -> str:
    if not (root / ".dvc").is_dir():
        return f"{path} is not versioned: this folder is no DVC repository (`dvc init`)"
    command = [str(Path(sys.executable).with_name("dvc")), "add", "--quiet", str(path)]
    result = subprocess.run(command, cwd=root, env=os.environ | {"DVC_NO_ANALYTICS": "1"}, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"`dvc add {path}` failed: {' '.join(result.stderr.split())}", remedy="see to that, then repeat `rlhf use`")
    return f"versioned {path} with DVC: commit {path}.dvc"


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
