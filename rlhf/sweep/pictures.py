"""Pictures of a sweep, as SVG: parallel coordinates, and fronts on which nothing is better in both."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf.sweep.state import Result

Direction = str
COLOURS = "viridis"
LONGEST_NAME = 24
LEAST_APART = 0.05  # of ticks, on an axis of height 1


def front(points: Sequence[tuple[float, ...]], directions: Sequence[Direction]) -> list[int]:
    """The places of the points that no other one is at least as good as in everything, and better in something."""
    signed = [tuple(value if way == "maximize" else -value for value, way in zip(point, directions, strict=True)) for point in points]

    def beaten(one: tuple[float, ...]) -> bool:
        return any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in signed)

    return [place for place, one in enumerate(signed) if not beaten(one)]


def against(results: Sequence[Result], x: Mapping[str, float], x_name: str, y_name: str, way: Direction) -> str:
    """One number against another that is to be small, with the front; points are labelled by their numbers.

    Args:
        results: of points that are done.
        x: of each, by its name; those that lack it are left out.
        x_name: what it is.
        y_name: the number of metrics/summary.json that counts.
        way: what is wanted of that.
    """
    shown = [result for result in results if result.name in x and result.metrics]
    xs, ys = [x[result.name] for result in shown], [(result.metrics or {})[y_name] for result in shown]
    figure, panel = _figure(6.0, 4.2)
    best = sorted(front(list(zip(xs, ys, strict=True)), ("minimize", way)), key=lambda place: xs[place])
    panel.plot(xs, ys, "o", color="#9aa5b1", label="points")
    panel.plot(
        [xs[place] for place in best], [ys[place] for place in best], "o-", color="#c2410c", label="front: nothing is better in both"
    )
    names: dict[tuple[float, float], list[str]] = {}
    for result, left, up in zip(shown, xs, ys, strict=True):
        names.setdefault((round(left, 6), round(up, 6)), []).append(str(result.number))
    for place, numbers in names.items():
        panel.annotate(", ".join(numbers), place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    panel.set(xlabel=x_name, ylabel=y_name)
    panel.margins(0.1)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return _svg(figure)


def parallel(results: Sequence[Result], keys: Sequence[str], numbers: Sequence[str], directions: Mapping[str, Direction]) -> str:
    """A line for each point through its values and numbers, coloured by the first number: the better the brighter, and drawn last.

    Args:
        results: of points that are done.
        keys: of the values, an axis each.
        numbers: of metrics/summary.json, an axis each.
        directions: what is wanted of the numbers.
    """
    axes = [*keys, *numbers]
    columns = [_column([_cell(result, name) for result in results]) for name in axes]
    first = columns[len(keys)][0] if numbers else [0.5] * len(results)
    better = [place if directions.get(numbers[0]) != "minimize" else 1 - place for place in first] if numbers else first
    figure, panel = _figure(1.7 * max(len(axes), 4), 4.4)
    for number in sorted(range(len(results)), key=lambda number: better[number]):
        heights = [column[0][number] for column in columns]
        panel.plot(range(len(axes)), heights, "-o", color=colormaps[COLOURS](0.05 + 0.85 * better[number]), alpha=0.8, markersize=3.5)
    for place, (_, ticks) in enumerate(columns):
        panel.axvline(place, color="#444", linewidth=0.8)
        for height, text in ticks:
            panel.annotate(text, (place, height), textcoords="offset points", xytext=(5, 0), fontsize=8, va="center")
    names = [name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :] for name in axes]
    panel.set_xticks(range(len(axes)), [f"{name}\n({directions[name]})" if name in directions else name for name in names], fontsize=8)
    panel.set_yticks([])
    panel.set_xlim(-0.2, len(axes) - 0.4)
    for side in ("top", "right", "left", "bottom"):
        panel.spines[side].set_visible(False)
    return _svg(figure)


def _cell(result: Result, name: str) -> Any:
    return result.values[name] if name in result.values else (result.metrics or {})[name]


def _column(cells: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1, and ticks: of numbers on their scale, of anything else in the order in which they came."""
    is_scale = all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)
    if not is_scale:
        different = list(dict.fromkeys(json.dumps(cell) if not isinstance(cell, str) else cell for cell in cells))
        height = {text: (place + 0.5) / len(different) for place, text in enumerate(different)}
        return [height[cell if isinstance(cell, str) else json.dumps(cell)] for cell in cells], [(up, text) for text, up in height.items()]
    low, high = min(cells), max(cells)
    # learning rates and the like: ends far apart
    is_log = low > 0 and high / low >= 10

    def up(value: float) -> float:
        if low == high:
            return 0.5
        return math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)

    marks = sorted(set(cells)) if len(set(cells)) <= 6 else [low, (low * high) ** 0.5 if is_log else (low + high) / 2, high]
    apart = [mark for place, mark in enumerate(marks) if not place or up(mark) - up(marks[place - 1]) > LEAST_APART]
    return [up(cell) for cell in cells], [(up(mark), f"{mark:.4g}") for mark in apart]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
