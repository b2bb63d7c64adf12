"""docs/params.md: the reference of params.yaml, written from the schema in rlhf/config/."""

from __future__ import annotations

from typing import Any

from rlhf.config import Params

Schema = dict[str, Any]

HEAD = """# params.yaml, key by key

Written from the schema by `rlhf reference > docs/params.md`; do not edit by hand. There are no defaults: every key stands in
params.yaml, and `rlhf use PRESET [key=value …]` writes a whole one. `N` stands for a place in a list, counted from 0.
"""


def markdown() -> str:
    """The reference, as Markdown."""
    schema = Params.model_json_schema()
    places: dict[str, list[str]] = {}
    _collect(schema, "", schema["$defs"], places)
    lines = [HEAD, *_table(schema, schema["$defs"])]
    for name, where in places.items():
        section = schema["$defs"][name]
        lines += ["", f"## {', '.join(dict.fromkeys(where))}", ""]
        if "description" in section:
            lines += [section["description"], ""]
        lines += _table(section, schema["$defs"])
    return "\n".join(lines) + "\n"


def _collect(section: Schema, path: str, definitions: Schema, places: dict[str, list[str]]) -> None:
    """Where each section of the schema stands in params.yaml, in order: one used in several places is described once."""
    for key, value in section.get("properties", {}).items():
        place = f"{path}.{key}".removeprefix(".")
        inner = value.get("items", value)
        place += ".N" if "items" in value else ""
        for name, heading in _sections(inner, place, definitions):
            places.setdefault(name, []).append(heading)
            _collect(definitions[name], place, definitions, places)


def _sections(value: Schema, place: str, definitions: Schema) -> list[tuple[str, str]]:
    """The definitions that a value may follow, each with its heading; the discriminator tells the forms of a union apart."""
    if "$ref" in value:
        return [(value["$ref"].rpartition("/")[2], f"`{place}`")]
    if "anyOf" in value:
        return [section for option in value["anyOf"] for section in _sections(option, place, definitions)]
    key = value.get("discriminator", {}).get("propertyName")
    names = [option["$ref"].rpartition("/")[2] for option in value.get("oneOf", [])]
    return [(name, f"`{place}` with {key} {_value(definitions[name]['properties'][key], definitions)}") for name in names]


def _table(section: Schema, definitions: Schema) -> list[str]:
    rows = [
        f"| `{key}` | {_value(value, definitions)} | {value.get('description', '').replace('|', chr(92) + '|')} |"
        for key, value in section["properties"].items()
    ]
    return ["| key | value | meaning |", "|---|---|---|", *rows]


def _value(value: Schema, definitions: Schema) -> str:
    """What may stand there, in words."""
    if "anyOf" in value:
        return " or ".join(_value(option, definitions) for option in value["anyOf"])
    if "const" in value or "enum" in value:
        return " or ".join(f"`{option}`" for option in value.get("enum", [value.get("const")]))
    if "prefixItems" in value:
        return f"list of {len(value['prefixItems'])}: {_value(value['prefixItems'][0], definitions)}"
    if value.get("pattern", "").startswith("^[a-z0-9]"):
        return "lower-case letters, digits, `-`, `_`"
    if "items" in value:
        return "list of names" if value["items"].get("type") == "string" else "list of sections, below"
    words = {"boolean": "true or false", "string": "text"}.get(value.get("type", ""), str(value.get("type", "section, below")))
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    return " ".join([words, " and ".join(f"{sign} {value[bound]}" for bound, sign in bounds.items() if bound in value)]).strip()
