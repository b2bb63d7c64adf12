"""The text of params.yaml and dvc.yaml as data: YAML 1.2, as DVC reads the same files, and each key once.

PyYAML by itself reads YAML 1.1, where `yes` is true, 010 is eight, 1:30 is ninety and 2e-3 is a text, and takes the last of two equal keys.
"""

from __future__ import annotations

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UserError

FORMS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9_]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
)
LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # of YAML 1.1


class Loader(yaml.SafeLoader):
    """Reads numbers, words and keys as YAML 1.2 does."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands there twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.value == "<<":
                raise yaml.constructor.ConstructorError(None, None, "maps are not merged here: write all of its keys", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        return int(text, 0) if text.lstrip("+-")[1:2] in ("b", "o", "x") else int(text)


for _name, _form, _first in FORMS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^({_form})$"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def read(path: Path, remedy: str) -> Any:
    """The content of a YAML file, not checked yet.

    Args:
        remedy: where there is no such file.

    Raises:
        UserError: the file is missing or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", remedy=remedy) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}", remedy=f"correct {path}: it is to be UTF-8") from None
    return parse(text, str(path))


def parse(text: str, origin: str) -> Any:
    """The content of a YAML text; `origin` names it in errors.

    Raises:
        UserError: it is not YAML.
    """
    if found := LINE_ENDS.search(text):
        line = text.count("\n", 0, found.start()) + 1
        what = f"{origin}, line {line}: not valid YAML: U+{ord(found[0]):04X} ends a line for some readers, and none for others"
        raise UserError(what, remedy=f"take it out of {origin}")
    try:
        return deepcopy(_parsed(text))
    except RecursionError:
        what = "nested too deeply"
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:  # of values that its tags make no sense of
        what = " ".join(str(error).split())
    raise UserError(f"{origin}: not valid YAML: {what}", remedy=f"correct {origin}, or `rlhf use PRESET`")


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    # a run reads the same file a dozen times, and libyaml, which would be quicker, takes some texts otherwise
    return yaml.load(text, Loader)
