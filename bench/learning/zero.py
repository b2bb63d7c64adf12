"""Every way of sharing models out among two ranks against ZeRO 0: the largest difference in 20 steps of sft, reward and ppo.

python bench/learning/zero.py            all of them, on tiny models: some minutes on two cores
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.stage_runs import make_workspace, run, set_params, table, tiny_params  # noqa: E402

STEPS = 20
STAGES = ("sft", "reward", "ppo")
LAYOUTS = {
    "ZeRO 0": (0, False),
    "ZeRO 1": (1, False),
    "ZeRO 2": (2, False),
    "ZeRO 3": (3, False),
    "ZeRO 1, offloaded": (1, True),
    "ZeRO 2, offloaded": (2, True),
    "ZeRO 3, offloaded": (3, True),
}
LOSSES = {"sft": ("loss",), "reward": ("loss",), "ppo": ("policy_loss", "value_loss", "mixture_loss")}


def main() -> None:
    """Print the largest absolute difference of a loss from ZeRO 0, and the largest relative one of a gradient's norm."""
    with ExitStack() as afterwards:
        place = Path(tempfile.mkdtemp(prefix="rlhf-zero-"))
        afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        base = place / "base"
        base.mkdir()
        make_workspace(base, tiny_params(), 240)
        run(base, "base")
        for name, (stage, offload) in LAYOUTS.items():
            shutil.copytree(base, place / name, ignore=shutil.ignore_patterns("runs"))
            set_params(place / name, params(stage, offload))
        run(place, *(f"{name}/{stage}" for name in LAYOUTS for stage in STAGES), ranks=2)
        Console().print(drawn(place))


def params(stage: int, offload: bool) -> dict[str, Any]:
    raw = tiny_params()
    for name in ("sft", "reward"):
        raw[name] |= {"epochs": 4.0, "checkpoint_every": 1000}  # five steps each
    raw["ppo"] |= {"steps": STEPS, "checkpoint_every": 1000}
    trained = {"zero_stage": stage, "offload_optimizer": offload, "offload_parameters": offload and stage == 3}
    frozen = {"zero_stage": 3 if stage == 3 else 0, "offload_parameters": offload and stage == 3}
    raw["launch"]["engines"] = {"policy": trained, "critic": trained, "reference": frozen, "reward": frozen}
    for job in raw["launch"]["jobs"].values():
        job |= {"processes": 2, "micro_batch_tokens": 150}
    return raw


def drawn(place: Path) -> Table:
    shown = Table(title=f"Largest difference from ZeRO 0 in {STEPS} steps, two ranks", title_justify="left")
    for heading in ("layout", *(f"{stage} {what}" for stage in STAGES for what in ("loss", "norm"))):
        shown.add_column(heading, justify="left" if heading == "layout" else "right")
    for name in LAYOUTS:
        cells = []
        for stage in STAGES:
            expected, rows = (table(place / layout / f"plots/{stage}.csv") for layout in ("ZeRO 0", name))
            assert len(expected) == len(rows) == STEPS
            pairs = [(key, float(a[key]), float(b[key])) for a, b in zip(expected, rows, strict=True) for key in a if a[key]]
            loss = max(abs(a - b) for key, a, b in pairs if key in LOSSES[stage])
            norm = max(abs(a - b) / max(abs(a), 1e-6) for key, a, b in pairs if key.endswith("grad_norm"))
            cells += [f"{loss:.1e}", f"{norm:.1e}"]
        shown.add_row(name, *cells)
    return shown


if __name__ == "__main__":
    typer.run(main)
