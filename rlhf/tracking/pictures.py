"""Pictures of the tables that the stages write."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PANELS_PER_ROW = 4


def draw(table: Path, axes: Mapping[str, Any]) -> None:
    """Draw a CSV file as a PNG beside it: every column against dvc.yaml's x, or its one pair of axes where the template is scatter."""
    if not table.exists():
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, scatter = axes["x"], axes.get("template") == "scatter"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [axes["y"]] if scatter else [name for name in (rows[0] if rows else ()) if name != x]
    columns = min(PANELS_PER_ROW, len(names)) or 1
    figure = Figure(figsize=(4 * columns, 2.6 * -(-len(names) // columns) or 1), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, start=1):
        points = [(float(row[x]), float(row[name])) for row in rows if row[x] and row[name]]
        panel = figure.add_subplot(-(-len(names) // columns), columns, number, xlabel=x, title=name)
        panel.plot(*zip(*points, strict=True), "o" if scatter else "-") if points else None
        panel.grid(alpha=0.3)
    figure.savefig(table.with_suffix(".png"), dpi=100)
