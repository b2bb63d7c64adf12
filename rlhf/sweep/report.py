"""The report of a sweep: one HTML page that needs nothing else, and no internet."""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlhf.sweep.space import Direction, Space
from rlhf.sweep.state import DONE, FAILED, Result

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 78em; margin: 2em auto; padding: 0 1em; color: #1f2933; background: #fff }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { border: 1px solid #cbd2d9; padding: .25em .6em; text-align: right; vertical-align: top }
td.text, th.text { text-align: left } td:first-child { white-space: nowrap } th { background: #f5f7fa; cursor: pointer; user-select: none }
tr.front td { background: #fff4ec } tr.failed td { color: #b42318 }
.wide { overflow-x: auto } .pictures { display: flex; gap: 1em } .pictures img { flex: 1 1 0; min-width: 0 } img { max-width: 100% }
code { background: #f5f7fa; padding: .1em .3em } p.note { color: #52606d }
"""
# a click on a heading sorts; without scripts the page is whole, too
SCRIPT = """
for (const head of document.querySelectorAll("#points th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], place = head.cellIndex, up = head.dataset.up !== "1";
  const value = row => row.cells[place].dataset.value ?? row.cells[place].textContent;
  const compare = (a, b) => (isNaN(a) || isNaN(b) || a === "" || b === "" ? String(a).localeCompare(b) : a - b);
  [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b))).forEach(row => body.append(row));
  head.dataset.up = up ? "1" : "0";
};
"""
SEED = "seed"


def order(results: Sequence[Result], wanted: Mapping[str, Direction]) -> list[Result]:
    """Points that are done, the best by the first objective first; of equal ones by the next."""
    done = [result for result in results if result.state == DONE and wanted.keys() <= (result.metrics or {}).keys()]
    return sorted(
        done, key=lambda result: [(result.metrics or {})[name] * (-1 if way == "maximize" else 1) for name, way in wanted.items()]
    )


def html(space: Space, results: Sequence[Result], wanted: Mapping[str, Direction], about: str) -> str:
    """The page.

    Args:
        space: of the sweep.
        results: of all its points.
        wanted: the objectives.
        about: when and on what it began.
    """
    done, failed = order(results, wanted), [result for result in results if result.state == FAILED]
    left = len(results) - len(done) - len(failed)
    first, way = next(iter(wanted.items()))
    counts = ", ".join(f"{count} {what}" for count, what in ((len(done), "done"), (len(failed), "failed"), (left, "to do")) if count)
    parts = [f"<h1>Sweep {escape(space.name)}</h1>"]
    parts.append(f"<p>{len(results)} points by {space.method}: {counts}. {escape(about)}</p>")
    if done:
        best = done[0]
        parts.append(
            f"<p><b>Best by {first} ({way}): {escape(best.name)}</b>, {escape(_values(best))}. "
            f"<code>dvc exp apply {escape(best.name)}</code> brings it into the workspace, <code>rlhf run</code> then registers it.</p>"
        )
        parts += _pictures(space, done, wanted)
    parts += ["<h2>Points</h2>", _table(space, done, failed, wanted)]
    if SEED in space.values and len(space.values) > 1:
        parts += ["<h2>Over the seeds</h2>", _over_seeds(space, done, wanted)]
    if failed:
        parts.append("<h2>Failed</h2>")
        parts += [f"<p><b>{escape(result.name)}</b>, {escape(_values(result))}: {escape(result.error)}</p>" for result in failed]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Sweep {escape(space.name)}</title>'
    body = "\n".join(parts)
    body += f"\n<script>{SCRIPT}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n'


def _pictures(space: Space, done: Sequence[Result], wanted: Mapping[str, Direction]) -> list[str]:
    from rlhf.sweep import pictures

    first, way = next(iter(wanted.items()))
    numbers = [name for name in dict.fromkeys([*wanted, "kl"]) if all(name in (result.metrics or {}) for result in done)]
    drawn = []
    if first != "kl" and "kl" in numbers:
        kl = {result.name: (result.metrics or {})["kl"] for result in done}
        drawn.append(("KL", pictures.against(done, kl, "kl", first, way)))
    cost = {result.name: result.seconds for result in done if result.seconds is not None}
    if cost:
        drawn.append(("cost", pictures.against(done, cost, "seconds of training", first, way)))
    pareto = "".join(_image(svg, f"{first} against {what}") for what, svg in drawn)
    lines = pictures.parallel(done, list(space.values), numbers, wanted)
    return [
        f"<h2>{first} against KL and cost</h2><div class='pictures'>{pareto}</div>",
        f"<h2>Parallel coordinates</h2><p class='note'>A line for each point; the better its {first}, the brighter.</p>",
        f"<div class='wide'>{_image(lines, 'parallel coordinates')}</div>",
    ]


def _table(space: Space, done: Sequence[Result], failed: Sequence[Result], wanted: Mapping[str, Direction]) -> str:
    from rlhf.sweep import pictures

    names = list(dict.fromkeys([*wanted, *(name for result in done for name in result.metrics or {})]))
    points = [tuple((result.metrics or {})[name] for name in wanted) for result in done]
    best = {done[place].name for place in pictures.front(points, list(wanted.values()))}
    heads = [("point", True), *((key, False) for key in space.values), *((name, False) for name in names), ("seconds", False)]
    rows = ["".join(f"<th{' class=text' if text else ''}>{escape(name)}</th>" for name, text in heads)]
    for result in (*done, *failed):
        kind = "failed" if result.state == FAILED else "front" if result.name in best else ""
        cells = [f'<td class="text" data-value="{result.number}">{escape(result.name)}{" ★" if kind == "front" else ""}</td>']
        cells += [_cell(result.values.get(key)) for key in space.values]
        cells += [_cell((result.metrics or {}).get(name, "")) for name in names]
        cells.append(_cell(round(result.seconds, 1) if result.seconds is not None else ""))
        rows.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    ways = ", ".join(f"{name} ({way})" for name, way in wanted.items())
    note = f"<p class='note'>★: no other point is as good in {escape(ways)} and better in one. A click on a heading sorts.</p>"
    return f'{note}<div class="wide"><table id="points"><thead><tr>{rows[0]}</tr></thead><tbody>{"".join(rows[1:])}</tbody></table></div>'


def _over_seeds(space: Space, done: Sequence[Result], wanted: Mapping[str, Direction]) -> str:
    keys = [key for key in space.values if key != SEED]
    groups: dict[str, list[Result]] = {}
    for result in done:
        groups.setdefault(json.dumps([result.values.get(key) for key in keys]), []).append(result)
    heads = [*keys, "seeds", *(f"{name}, mean (least … most)" for name in wanted)]
    rows = []
    for group in groups.values():
        cells = [_cell(group[0].values.get(key)) for key in keys] + [_cell(len(group))]
        for name in wanted:
            found = [(result.metrics or {})[name] for result in group if name in (result.metrics or {})]
            cells.append(f"<td>{statistics.fmean(found):.4g} ({min(found):.4g} … {max(found):.4g})</td>" if found else "<td></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _cell(value: Any) -> str:
    said = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return f'<td data-value="{escape(str(value))}">{escape(said)}</td>'


def _values(result: Result) -> str:
    return ", ".join(f"{key} {value}" for key, value in result.values.items())


def _image(svg: str, alternative: str) -> str:
    return f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'
