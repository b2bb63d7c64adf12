"""What a speed benchmark found: cases as they stand in bench/results.json, and as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.speed.sides import Step

# name, ours, peer, ratio, unit, setting; ratios of all rounds; processor_ratio, of processor time, which other work beside changes little
Case = dict[str, Any]
PACKAGES = ("torch", "transformers", "deepspeed", "trl", "accelerate")


def case(name: str, work: Sequence[float], rounds: Sequence[tuple[Step, Step]], unit: str, setting: str) -> Case:
    """Of rounds in which both sides did the same work, ours first.

    Args:
        work: units of each round.
    """
    ours, peer = (statistics.median(units / pair[side].seconds for units, pair in zip(work, rounds, strict=True)) for side in (0, 1))
    ratios = [other.seconds / one.seconds for one, other in rounds]
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "processor_ratio": statistics.median(other.processor / one.processor for one, other in rounds),
        "unit": unit,
        "setting": f"{setting}, {len(rounds)} rounds",
    }


def collect(cases: Iterable[Case]) -> list[Case]:
    """All of them; each is told of as soon as it is known."""
    found = []
    for one in cases:
        found.append(one)
        ratios = " ".join(f"{ratio:.2f}" for ratio in one["ratios"])
        said = f"{one['name']}: {one['ours']:.4g} against {one['peer']:.4g} {one['unit']}, rounds {ratios}"
        print(f"{said}, of processor time {one['processor_ratio']:.2f}", one["setting"], sep="\n", file=sys.stderr, flush=True)
    return found


def write(path: Path, cases: Sequence[Case], **more: Any) -> dict[str, Any]:
    """Cases, and what they were measured on; gives what was written."""
    found = {"machine": {"processor": processor(), "cores": os.cpu_count()}, "versions": versions(), "cases": list(cases), **more}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def versions() -> dict[str, str]:
    """Of what the speed depends on, where it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_section(page: Path, heading: str, text: str) -> None:
    """Put a section in the place of the one of the same heading, or at the end of the page."""
    parts = ("\n" + page.read_text(encoding="utf-8") if page.exists() else "").split("\n# ")[1:]
    texts = dict(part.split("\n", 1) for part in parts)
    texts[heading] = f"\n{text}"
    page.write_text("\n".join(f"# {name}\n{written.rstrip()}\n" for name, written in texts.items()), encoding="utf-8")


def markdown(found: Mapping[str, Any]) -> str:
    """What was written, as a section of a page."""
    only = f' --only "{found["only"]}"' if found["only"] else ""
    machine, packages = found["machine"], ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    cases = [
        [one["name"], one["setting"], f"{one['ours']:.4g}", f"{one['peer']:.4g}", one["unit"], f"{one['ratio']:.2f}", spread(one)]
        for one in found["cases"]
    ]
    growth = [
        [row["name"], row["setting"], *(f"{row[key]:.2f}" for key in ("seconds", "seconds_ratio", "memory_gib", "memory_ratio"))]
        for row in found["scaling"]
    ]
    return "\n".join(
        [
            f"Written by `python bench/speed/run.py{only} --page bench/speed/RESULTS.md`, both sides in turn, on the same work.",
            "",
            f"{machine['cores']} cores of {machine['processor']}, and no other device; {packages}. Texts: {found['texts']}.",
            "",
            *([*rows_of(["case", "work", "ours", "peer", "unit", "ratio", "of the rounds"], cases), ""] if cases else []),
            *(["How a PPO step grows, one thread for each rank:", ""] if growth else []),
            *(rows_of(["", "work", "seconds", "× base", "GiB of rank 0", "× base"], growth) if growth else []),
            "",
        ]
    )


def rows_of(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]


def spread(one: Case) -> str:
    return f"{min(one['ratios']):.2f} … {max(one['ratios']):.2f}"


def processor() -> str:
    """Its name, where the machine says it."""
    place = Path("/proc/cpuinfo")
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(cases: Sequence[Case]) -> Table:
    drawn = Table(title="Speed, in turn on this machine", title_justify="left")
    for name in ("case", "ours", "peer", "unit", "ratio", "of the rounds", "of processor time"):
        drawn.add_column(name, justify="left" if name in {"case", "unit"} else "right")
    for one in cases:
        drawn.add_row(
            one["name"],
            f"{one['ours']:.4g}",
            f"{one['peer']:.4g}",
            one["unit"],
            f"{one['ratio']:.2f}",
            spread(one),
            f"{one['processor_ratio']:.2f}",
        )
    return drawn


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)
