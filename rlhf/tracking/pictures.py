"""Pictures of the tables that the stages write: what decides first, and a smooth line over what is noise."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS_PER_ROW = 4
FIRST = ("gold", "reward_model", "reward", "kl", "accuracy", "loss")
HELD_OUT = "heldout_"  # drawn with the column that it is the held-out side of
POINTS_TO_SMOOTH = 16


def load() -> None:
    """Load what draws, which takes half a second."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def draw(table: Path, axes: Mapping[str, Any]) -> None:
    """Draw a CSV file as a PNG beside it: every column against dvc.yaml's x, as points where its template is scatter."""
    if table.exists():
        _draw(table, axes)


def draw_all(tables: Mapping[Path, Mapping[str, Any]], kept: Path) -> None:
    """Draw tables, or take the pictures of the same ones from a folder that keeps the last: a run with nothing to do draws nothing.

    Args:
        tables: that are there, with the axes of each.
        kept: the folder; what is not among these tables is removed from it.
    """
    kept.mkdir(parents=True, exist_ok=True)
    wanted = set()
    for table, axes in tables.items():
        what = table.read_bytes() + json.dumps(axes, sort_keys=True).encode()
        picture = kept / f"{hashlib.sha256(what).hexdigest()[:16]}.png"
        wanted.add(picture)
        if picture.exists():
            shutil.copyfile(picture, table.with_suffix(".png"))
            continue
        _draw(table, axes)
        beside = picture.with_suffix(".new")
        shutil.copyfile(table.with_suffix(".png"), beside)
        beside.rename(picture)
    for path in set(kept.iterdir()) - wanted:
        path.unlink()


def _draw(table: Path, axes: Mapping[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, scatter = axes["x"], axes.get("template") == "scatter"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = panels(list(rows[0]) if rows else [], x)
    columns = min(PANELS_PER_ROW, len(names)) or 1
    figure = Figure(figsize=(4 * columns, 2.6 * -(-len(names) // columns) or 1), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, start=1):
        panel = figure.add_subplot(-(-len(names) // columns), columns, number, xlabel=x, title=name)
        _curve(panel, _points(rows, x, name), scatter=scatter)
        if held_out := _points(rows, x, HELD_OUT + name):
            panel.plot(*zip(*held_out, strict=True), "o-", color="C1", label="held out")
            panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(table.with_suffix(".png"), dpi=100)


def panels(columns: Sequence[str], x: str) -> list[str]:
    """The columns that have a panel of their own, those that decide first."""
    names = [name for name in columns if name not in (x, "step") and name.removeprefix(HELD_OUT) not in {*columns} - {name}]
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def smooth(values: Sequence[float]) -> list[float]:
    """For each value the mean of those around it, an eighth of all; fewer at the ends."""
    import numpy as np

    window = np.ones(2 * (len(values) // 16) + 1)
    found: list[float] = (np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")).tolist()
    return found


def _curve(panel: Axes, points: Sequence[tuple[float, float]], *, scatter: bool) -> None:
    if not points:
        return
    xs, ys = zip(*(sorted(points) if scatter else points), strict=True)
    is_noise = len(points) >= POINTS_TO_SMOOTH
    panel.plot(xs, ys, "o" if scatter else "-", color="C0", alpha=0.35 if is_noise else 1)
    if is_noise:
        panel.plot(xs, smooth(ys), "-", color="C0")


def _points(rows: Sequence[Mapping[str, str]], x: str, name: str) -> list[tuple[float, float]]:
    return [(float(row[x]), float(row[name])) for row in rows if row[x] and row.get(name)]
