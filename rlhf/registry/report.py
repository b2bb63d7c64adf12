"""The report of a flow run: the decision, every gate, the numbers beside the champion's, answers side by side, pictures.

One page of Markdown, which Prefect shows, and the same as a web page by itself, which MLflow shows.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rlhf.job import read_lines
from rlhf.registry import Decision, Verdict, Version, comparison, gates
from rlhf.tracking import pictures
from rlhf.workspace import fingerprint

SAMPLES = Path("data/samples.jsonl")
SHOWN = 8
EVALUATED = "evaluate."
IDENTITIES = ("evaluate.heldout", "evaluate.judge")
# what would be markup; an underscore is, where it begins or ends a word
MARKUP = re.compile(r"[\\`*{}\[\]<>|#&~!]|(?<!\w)_|_(?!\w)")
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}img{max-width:100%}"
)


@dataclass(frozen=True)
class Evidence:
    """What the report shows of the workspace, read while it is this run's."""

    numbers: list[dict[str, str]]
    note: str
    samples: list[dict[str, Any]]
    beside_champion: list[dict[str, Any]]
    pictures: dict[str, bytes]


def collect(root: Path, verdict: Verdict, champion: Version | None, results: Path) -> Evidence:
    """Read the evidence, and copy numbers and tables, with a picture (PNG) of each, to `results`.

    Args:
        root: the workspace.
        verdict: of this run.
        champion: what the version was held against; None where there was none, or it is the champion itself.
        results: a folder, made where it is missing.
    """
    plots = {path: axes for node in fingerprint.read_graph(root).values() for path, axes in node.plots.items() if (root / path).exists()}
    for path in (str(gates.METRICS), *plots):
        (results / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, results / path)
    drawn = {}
    for path, axes in plots.items():
        pictures.draw(results / path, axes)
        drawn[Path(path).stem] = (results / path).with_suffix(".png").read_bytes()
    beside = comparison.rows(verdict.version, champion, root)[:SHOWN] if champion else []
    samples = read_lines(root / SAMPLES)[:SHOWN] if (root / SAMPLES).exists() else []
    return Evidence(numbers(verdict.version, champion), _note(verdict.version, champion), samples, beside, drawn)


def numbers(version: Version, champion: Version | None) -> list[dict[str, str]]:
    """The table of the evaluation: for each metric this version's value, the champion's, and how much more the first is."""
    own, other = _measured(version), _measured(champion) if champion else {}
    rows = []
    for name, value in own.items():
        row = {"metric": name, "this version": _number(value), "champion": _number(other[name]) if name in other else "—"}
        before = other.get(name)
        difference = f"{value - before:+.4g}" if isinstance(value, float) and isinstance(before, float) else "—"
        rows.append(row | {"difference": difference})
    return rows


def tags(decision: Decision, before: int | None, by: str, why: str) -> dict[str, str]:
    """The decision as tags of the flow's run; its description there is what MLflow shows first."""
    version, kind = decision.version, _kind(decision, before)
    failed = [gate.name for gate in decision.gates if not gate.passed]
    described = [f"**{text(decision.lines[-1])}**", *(f"- {text(gate.line)}" for gate in decision.gates)]
    return {
        "decision": kind,
        "decision.outcome": decision.lines[-1],
        **({"decision.by": by, "decision.why": why} if kind == "promoted" else {}),
        "version": str(version.number),
        "champion": str(decision.champion or "none"),
        "champion.before": str(before or "none"),
        "gates": f"failed: {', '.join(failed)}" if failed else "passed",
        "mlflow.note.content": "\n".join(described),
        **{f"gate.{gate.name}": gate.line for gate in decision.gates},
        **{name: run for name, run in version.tags.items() if name.startswith("run.")},
    }


def markdown(decision: Decision, evidence: Evidence, links: Mapping[str, str]) -> str:
    """The page.

    Args:
        decision: what was done with the version.
        evidence: what it rests on.
        links: addresses of the MLflow runs, by what each was: the flow, or a stage.
    """
    version = decision.version
    parts = [f"# {text(version.model)}, version {version.number}", f"**{text(decision.lines[-1])}**"]
    if links:
        parts.append("MLflow: " + " · ".join(f"[{name}]({address})" for name, address in links.items()))
    checked = [(gate.name, "yes" if gate.passed else "no", gate.text) for gate in decision.gates]
    parts += ["## Gates", _table(("gate", "passed", "measured"), checked)]
    parts.append(f"## Measured on held-out data\n\n{evidence.note}")
    parts.append(_table(("metric", "this version", "champion", "difference"), [tuple(row.values()) for row in evidence.numbers]))
    if evidence.samples:
        policies = ("sft", version.tags["algorithm"])
        rows = [(_prompt(row["prompt"]), *(row[name] for name in policies)) for row in evidence.samples]
        parts += ["## Sample answers", _table(("prompt", *policies), rows)]
    if evidence.beside_champion:
        sides = ("new", "champion")
        answered = [(_prompt(row["prompt"]), *(row["answers"][side] for side in sides)) for row in evidence.beside_champion]
        parts += ["## Beside the champion", _table(("prompt", "this version", "champion"), answered)]
    if evidence.pictures:
        parts.append("## Course of the stages")
        parts += [f"### {name}\n\n![{name}]({data_uri(picture)})" for name, picture in evidence.pictures.items()]
    return "\n\n".join(parts) + "\n"


def html(page: str, title: str) -> str:
    """A page of Markdown as a web page that needs nothing else."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(page)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def data_uri(picture: bytes) -> str:
    """An address that holds the picture (PNG) itself."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def text(value: str) -> str:
    """What models and people wrote, with nothing in it that Markdown or HTML would take for its own."""
    return MARKUP.sub(r"\\\g<0>", value)


def _kind(decision: Decision, before: int | None) -> str:
    if not decision.is_champion:
        return "not promoted"
    return "champion already" if before == decision.version.number else "promoted"


def _measured(version: Version) -> dict[str, float | str]:
    """A version's evaluation; what belongs to its policy stands under that name, whichever algorithm trained it."""
    policy = f".{version.tags['algorithm']}"
    found: dict[str, float | str] = {}
    for key in sorted(version.tags):
        if key.startswith(EVALUATED) and key not in IDENTITIES:
            name = key.removeprefix(EVALUATED)
            name = f"{name.removesuffix(policy)}.policy" if name.endswith(policy) else name
            try:
                found[name] = float(version.tags[key])
            except ValueError:
                found[name] = version.tags[key]
    return found


def _note(version: Version, champion: Version | None) -> str:
    if champion is None:
        return "There is no other champion to compare with."
    if all(version.tags.get(name) == champion.tags.get(name) for name in IDENTITIES):
        return f"The champion is version {champion.number}, measured on the same prompts by the same judge."
    other = f"The champion is version {champion.number}, whose numbers are of other prompts or of another judge."
    return f"{other} The gates rest on its answers to these prompts."


def _number(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " … ".join(f"{end:.4g}" for end in json.loads(value)) if value.startswith("[") else value


def _prompt(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows])


def _cell(value: str) -> str:
    return text(value).replace("\n", "<br>")
