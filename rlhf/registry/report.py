"""The report of a flow run: what was decided, what failed and what to do about it, what changed, where it became worse, and all numbers.

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
from rlhf.registry import Decision, Verdict, Version, changes, comparison, gates
from rlhf.registry.changes import Changes
from rlhf.registry.course import Course, duration, moment
from rlhf.registry.registration import ANSWERS
from rlhf.registry.remedies import remedy
from rlhf.tracking import pictures
from rlhf.tracking import samples as tracking_samples
from rlhf.workspace import fingerprint

SAMPLES = Path("data/samples.jsonl")
ROLLOUTS = Path("data/rollouts.jsonl")
SHOWN = 8
OF_A_STEP = 2  # answers of a step of training
EVALUATED = "evaluate."
IDENTITIES = ("evaluate.heldout", "evaluate.judge")
# what would be markup; an underscore is, where it begins or ends a word
PICTURE = re.compile(r"data:image/png;base64,[\w+/=]+")
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
    worse: dict[str, list[dict[str, Any]]]  # than the champion, or than sft: the prompts on which the judge says so, worst first
    changes: Changes | None  # against the champion
    pictures: dict[str, bytes]
    course: list[dict[str, Any]]  # answers in the course of training, with their rewards


def collect(root: Path, verdict: Verdict, champion: Version | None, results: Path) -> Evidence:
    """Read the evidence, and copy numbers and tables, with a picture (PNG) of each, to `results`.

    Args:
        root: the workspace.
        verdict: of this run.
        champion: what the version was held against; None where there was none, or it is the champion itself.
        results: a folder, made where it is missing.
    """
    # what decides was drawn last: gold against KL before the losses
    nodes = reversed(list(fingerprint.read_graph(root).values()))
    plots = {path: axes for node in nodes for path, axes in node.plots.items() if (root / path).exists()}
    for path in (str(gates.METRICS), *plots):
        (results / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, results / path)
    pictures.draw_all({results / path: axes for path, axes in plots.items()}, root / "runs" / "pictures")
    drawn = {Path(path).stem: (results / path).with_suffix(".png").read_bytes() for path in plots}
    version = verdict.version
    worse = {"sft": regressions(read_lines(root / ANSWERS), version.tags["algorithm"], "sft")}
    if champion:
        worse = {"champion": regressions(comparison.rows(version, champion, root), "new", "champion")} | worse
    samples = read_lines(root / SAMPLES)[:SHOWN] if (root / SAMPLES).exists() else []
    changed = changes.between(champion, version, root) if champion else None
    course = [row for step in tracking_samples.chosen(root / ROLLOUTS, SHOWN) for row in step[:OF_A_STEP]]
    return Evidence(numbers(version, champion), _note(version, champion), samples, worse, changed, drawn, course)


def regressions(rows: Sequence[Mapping[str, Any]], new: str, old: str) -> list[dict[str, Any]]:
    """The prompts on which the judge finds the new answer worse than the old one, worst first.

    Args:
        rows: with `prompt`, and `answers` and `scores` by name.
        new: the name of the new answers.
        old: of those that they are held against.

    Returns:
        For each `prompt`, and `new` and `old`: the answer with its score.
    """
    judged = [row for row in rows if row.get("scores", {}).keys() >= {new, old}]
    worst = sorted(judged, key=lambda row: row["scores"][new] - row["scores"][old])[:SHOWN]
    return [
        {"prompt": row["prompt"], **{key: (row["answers"][name], row["scores"][name]) for key, name in (("new", new), ("old", old))}}
        for row in worst
        if row["scores"][new] < row["scores"][old]
    ]


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


def tags(decision: Decision, before: int | None, course: Course, by: str, why: str) -> dict[str, str]:
    """The decision as tags of the flow's run; its description there is what MLflow shows first.

    Args:
        decision: what was done.
        before: the champion until then.
        course: of the run.
        by: who decided.
        why: the reason given.
    """
    version, kind = decision.version, outcome(decision, before)
    failed = [gate.name for gate in decision.gates if not gate.passed]
    described = [f"**{text(decision.lines[-1])}**", *_run(course), "\n".join(f"- {text(gate.line)}" for gate in decision.gates)]
    return {
        "decision": kind,
        **({"decision.by": by, "decision.why": why} if kind == "promoted" else {}),
        "version": str(version.number),
        "champion": str(decision.champion or "none"),
        "champion.before": str(before or "none"),
        "gates": f"failed: {', '.join(failed)}" if failed else "passed",
        "mlflow.note.content": "\n\n".join(described),
        **{name: run for name, run in version.tags.items() if name.startswith("run.")},
    }


def outcome(decision: Decision, before: int | None) -> str:
    """What came of a version, in a word or two; `before` is the champion before."""
    if decision.is_champion:
        return "champion already" if before == decision.version.number else "promoted"
    if "promoted" in decision.version.tags:
        return "champion before"
    return "declined" if all(gate.passed for gate in decision.gates) else "refused"


def markdown(decision: Decision, evidence: Evidence, course: Course) -> str:
    """The page, what decides first.

    Args:
        decision: what was done with the version.
        evidence: what it rests on.
        course: when it ran, how long, and who or what started it.
    """
    version = decision.version
    algorithm = version.tags["algorithm"]
    parts = [f"# {text(version.model)}, version {version.number}", f"**{text(decision.lines[-1])}**"]
    if failed := [gate for gate in decision.gates if not gate.passed]:
        advice = [(gate.name, text(gate.text), remedy(gate.name, algorithm)) for gate in failed]
        parts += ["## Gates that failed", _table(("gate", "measured", "what to do"), advice, markup=True)]
    parts += ["## Go on", "\n".join(f"- `{command}` {what}" for command, what in commands(decision).items())]
    parts += ["## This run", *_run(course)]
    if evidence.changes:
        parts += ["## What changed against the champion", *_changes(evidence.changes)]
    for other, rows in evidence.worse.items():
        answered = [(_prompt(row["prompt"]), _answer(row["new"]), _answer(row["old"])) for row in rows]
        heading = f"## Worse than {'the champion' if other == 'champion' else other}: {len(rows)} worst answers"
        parts += [heading, _table(("prompt", "this version (score)", f"{other} (score)"), answered)] if rows else []
    checked = [(gate.name, "yes" if gate.passed else "no", gate.text) for gate in sorted(decision.gates, key=lambda gate: gate.passed)]
    parts += ["## Gates", _table(("gate", "passed", "measured"), checked)]
    parts.append(f"## Measured on held-out data\n\n{evidence.note}")
    parts.append(_table(("metric", "this version", "champion", "difference"), [tuple(row.values()) for row in evidence.numbers]))
    if evidence.pictures:
        parts.append("## Course of the stages")
        parts += [f"### {name}\n\n![{name}]({data_uri(picture)})" for name, picture in evidence.pictures.items()]
    if evidence.samples:
        policies = ("sft", algorithm)
        sampled = [
            (_prompt(row["prompt"]), *(_answer((row[name], row.get("scores", {}).get(name))) for name in policies))
            for row in evidence.samples
        ]
        parts += ["## Sample answers", _table(("prompt", *policies), sampled)]
    if evidence.course:
        shown = [tuple(_cell(row.get(name)) for name in evidence.course[0]) for row in evidence.course]
        parts += ["## Answers in the course of training", _table(tuple(evidence.course[0]), shown)]
    return "\n\n".join(parts) + "\n"


def commands(decision: Decision) -> dict[str, str]:
    """What one does next, by command."""
    number = decision.version.number
    if decision.is_champion:
        said = {"rlhf chat": "talks to it", 'rlhf rollback --why "…"': "puts the version before into service again, at once"}
    else:
        bounds = " ".join(f"promote.{gate.name}=…" for gate in decision.gates if not gate.passed and gate.name.startswith(("min", "max")))
        said = {
            f"rlhf chat --model {number}": "talks to it",
            f'rlhf promote {number} --why "…"': "puts it into service, whatever its gates said",
        }
        if bounds:
            said[f"rlhf use params.yaml {bounds} && rlhf run"] = "moves the bounds and decides again, without training"
    return said | {
        f"rlhf lineage {number}": "names all that it was made of",
        f"rlhf verify {number}": "shows that it can be had again",
        "rlhf models": "lists all versions, and who put which into service",
    }


def html(page: str, title: str) -> str:
    """A page of Markdown as a web page that needs nothing else."""
    from markdown_it import MarkdownIt

    # their addresses are left out meanwhile: it reads each of their million characters in Python
    pictures = list(dict.fromkeys(PICTURE.findall(page)))
    body = MarkdownIt("commonmark").enable("table").render(PICTURE.sub(lambda found: f"picture-{pictures.index(found[0])}.png", page))
    body = re.sub(r'(?<=src=")picture-(\d+)\.png(?=")', lambda found: pictures[int(found[1])], body)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def data_uri(picture: bytes) -> str:
    """An address that holds the picture (PNG) itself."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def text(value: str) -> str:
    """What models and people wrote, with nothing in it that Markdown or HTML would take for its own."""
    return MARKUP.sub(r"\\\g<0>", value)


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


def _run(course: Course) -> list[str]:
    took = duration(course.ended - course.started)
    began = f"Started {moment(course.started)} by {text(course.by)}; it took {took}. [Its MLflow run]({course.page})"
    rows = []
    for stage in course.stages:
        took = duration(stage.ended - stage.started) if stage.ended else "—"
        state = "trained in this run" if stage.now else f"up to date since {moment(stage.started)}"
        rows.append((f"[{stage.name}]({stage.page})", state, took))
    return [began, *([_table(("stage", "state", "took"), rows, markup=True)] if rows else [])]


def _changes(found: Changes) -> list[str]:
    parts = [_table(("param", "champion", "this version"), found.params)] if found.params else ["Params: none."]
    for name, lines in (("Data", found.data), ("Code", found.code)):
        parts.append("\n".join([f"{name}:\n", *(f"- {text(line)}" for line in lines)]) if lines else f"{name}: none.")
    return parts


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _answer(answered: tuple[str, float | None]) -> str:
    answer, score = answered
    said = answer or "(nothing)"
    return said if score is None else f"{said}\n({score:.2f})"


def _prompt(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, markup: bool = False) -> str:
    """A table; cells are plain text, unless they are Markdown already."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    cells = [[cell if markup else text(cell) for cell in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in cells])
