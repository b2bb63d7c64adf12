"""Tables of what bench/real_model/seeds.py left: what was learnt, beside TRL's, what it cost, and whether a second run gave the same bytes.

python bench/real_model/results.py DIR

Where seeds ask the same held-out prompts (smollm2-135m-checkable), an interval of several is over prompts, each with its mean over seeds.
Where each seed deals the rows anew (smollm2-135m-hh), the mean's standard error is that of means that know nothing of each other. Neither
knows of the luck of training: the seeds' own numbers stand beside.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.clone import REPOSITORY
from rlhf.registry import gates
from rlhf.workspace import presets

SAMPLES = 10_000
TENTHS = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the course of training, as shown
NORMAL = 1.96

Row = dict[str, Any]


def main(folder: Annotated[Path, typer.Argument(help="What seeds.py wrote.")]) -> None:
    """Print the tables, in Markdown."""
    rows = [json.loads(line) for line in (folder / "stages.jsonl").read_text(encoding="utf-8").splitlines()]
    with zipfile.ZipFile(folder / "files.zip") as archive:
        for part in (checkable, preferences, courses, peers_of_pairs):
            part(rows, archive)
    costs(rows)
    bytes_again(rows)
    for row in rows:
        if row["how"] != 0:
            print(f"{row['name']}: {row['how']} {row['why']} after {row['seconds']:.0f} s, step {row.get('steps', 0)}")


def evaluations(rows: Sequence[Row], preset: str, policy: str) -> list[Row]:
    """The rows of stage evaluate of a preset and a branch (trl, or ppo_NAME of a variant, too), without those that were run again."""
    found = [row for row in rows if row["stage"] == "evaluate" and row["how"] == 0 and row["preset"].endswith(preset)]
    return [row for row in found if "-again" not in row["name"] and policy_of(row) == policy]


def policy_of(row: Row) -> str:
    return str(row["name"]).partition(" ")[0].rpartition("-")[2]


def table(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    print("\n| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for line in lines:
        print("| " + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in line) + " |")


def bounds(interval: Sequence[float], digits: int = 3) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def read(archive: zipfile.ZipFile, row: Row, name: str) -> str:
    return archive.read(f"{row['name']}/{name}").decode()


# ------------------------------------------------------------------------------------------------------------- checkable


def checkable(rows: Sequence[Row], archive: zipfile.ZipFile) -> None:
    """Accuracy of sft, grpo and TRL's, by source."""
    found = {
        policy: [answers_of(archive, row) for row in evaluations(rows, "checkable", policy)] for policy in ("grpo", "grpo_short", "trl")
    }
    if not found["grpo"]:
        return
    sources = ["", *dict.fromkeys(line["source"] for line in found["grpo"][0].values())]
    headings = ["held-out", "n", "sft", "grpo", "difference", "95%", "each seed"]
    lines = [[source or "all", *risen(found["grpo"], source, "sft")] for source in sources]
    table(headings, lines)
    both = [
        {key: beside(line, theirs[key]) for key, line in answers_of(archive, ours).items()} for ours, theirs in beside_trl(rows, archive)
    ]
    if both:
        table(["held-out", "n", "TRL's", "grpo", "difference", "95%", "each seed"], [[s or "all", *risen(both, s, "trl")] for s in sources])
    table(["seed", *MEASURES, "gates that fail"], [told(row) for policy in found for row in evaluations(rows, "checkable", policy)])


def beside_trl(rows: Sequence[Row], archive: zipfile.ZipFile) -> list[tuple[Row, dict[str, Row]]]:
    """Our evaluation of each seed with as many steps as TRL's, and the answers of TRL's."""
    short = evaluations(rows, "checkable", "grpo_short") or evaluations(rows, "checkable", "grpo")
    ours = {row["seed"]: row for row in short}
    theirs = {row["seed"]: row for row in evaluations(rows, "checkable", "trl")}
    return [(ours[seed], answers_of(archive, theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]


def answers_of(archive: zipfile.ZipFile, row: Row) -> dict[str, Row]:
    """The held-out answers of an evaluation, by prompt and reference."""
    lines = [json.loads(line) for line in read(archive, row, "answers.jsonl").splitlines()]
    return {json.dumps([line["prompt"], line["reference"]]): line for line in lines}


def beside(ours: Row, theirs: Row) -> Row:
    return {**ours, "right": {"grpo": ours["right"]["grpo"], "trl": theirs["right"]["grpo"]}}


def risen(runs: Sequence[dict[str, Row]], source: str, before: str) -> list[Any]:
    """How many prompts of a source, both accuracies, their difference with its interval over prompts, and the difference of each run."""
    keys = [key for key, line in runs[0].items() if source in ("", line["source"])]
    after, first = (
        np.array([[statistics.fmean(run[key]["right"][name]) for key in keys] for run in runs]).mean(0) for name in ("grpo", before)
    )
    each = [
        statistics.fmean(statistics.fmean(run[key]["right"]["grpo"]) - statistics.fmean(run[key]["right"][before]) for key in keys)
        for run in runs
    ]
    apart = after - first
    return [
        len(keys),
        float(first.mean()),
        float(after.mean()),
        float(apart.mean()),
        bounds(interval(apart)),
        ", ".join(f"{d:+.3f}" for d in each),
    ]


def interval(values: np.ndarray) -> list[float]:
    """95% percentile interval of the mean, values resampled with replacement."""
    drawn = np.random.default_rng(1).integers(len(values), size=(SAMPLES, len(values)))
    return [float(bound) for bound in np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])]


# ----------------------------------------------------------------------------------------------------------- preferences


def preferences(rows: Sequence[Row], _: zipfile.ZipFile) -> None:
    """The reward model; and each algorithm's policy as the judge sees it."""
    for policy in dict.fromkeys(policy_of(row) for row in rows if row["stage"] == "evaluate" and row["preset"].endswith("hh")):
        found = evaluations(rows, "hh", policy)
        if not found:
            continue
        table(["seed", *MEASURES, "gates that fail"], [told(row) for row in found])
        measures: dict[str, Callable[[Row], tuple[float, Sequence[float]]]] = {
            "win rate": lambda m: (m["win_rate"]["value"], m["win_rate"]["ci95"]),
            "at equal length": lambda m: (m["win_rate"]["length_controlled"]["value"], m["win_rate"]["length_controlled"]["ci95"]),
            "reward accuracy": lambda m: (m["reward_model"]["accuracy"], m["reward_model"]["accuracy_ci95"]),
        }
        lines = []
        for name, measure in measures.items():
            values = [measure(row["metrics"]["evaluate"]) for row in found]
            mean, limits = pooled(values)
            lines.append([name, mean, bounds(limits), ", ".join(f"{value:.3f} ({bounds(own, 2)})" for value, own in values)])
        table([policy, "mean", "95%", "each seed"], lines)


def pooled(values: Sequence[tuple[float, Sequence[float]]]) -> tuple[float, list[float]]:
    """The mean of several means, and its 95% interval where each has one of its own and they are apart from each other."""
    mean = statistics.fmean(value for value, _ in values)
    error = math.hypot(*((high - low) / 2 for _, (low, high) in values)) / len(values)
    return mean, [mean - error, mean + error]


def told(row: Row) -> list[Any]:
    found, policy = row["metrics"]["evaluate"], "grpo" if policy_of(row) == "trl" else policy_of(row).partition("_")[0]
    text = (REPOSITORY / "presets" / f"{row['preset']}.yaml").read_text(encoding="utf-8")
    params = presets.with_values(text, row["values"], row["preset"])[1]
    failed = [gate.name for gate in gates.check(found, params, None) if not gate.passed]
    return [f"{row['seed']}, {policy_of(row)}", *(measure(found, policy) for measure in MEASURES.values()), ", ".join(failed) or "none"]


def _both(name: str) -> Callable[[Row, str], str]:
    return lambda found, policy: f"{found[name]['sft']:.3g} → {found[name][policy]:.3g}"


MEASURES: dict[str, Callable[[Row, str], Any]] = {
    "KL": lambda found, _: float(found["kl"]),
    "answers that end": _both("eos_rate"),
    "tokens": _both("answer_tokens"),
    "refusals": _both("refusals"),
    "repetitions": _both("repetitions"),
    "perplexity": _both("perplexity"),
    "calibration error": lambda found, _: float(found["reward_model"]["calibration"]["error"]) if found["reward_model"] else "",
}


def courses(rows: Sequence[Row], archive: zipfile.ZipFile) -> None:
    """The judge's score and the reward against the KL, in the course of training."""
    for preset, policy in (("hh", "ppo"), ("hh", "grpo"), ("checkable", "grpo")):
        for row in evaluations(rows, preset, policy):
            points = list(csv.DictReader(io.StringIO(read(archive, row, "gold_against_kl.csv"))))
            shown = [points[max(0, round(share * len(points)) - 1)] for share in TENTHS]
            print(f"\n{row['name']}, step: KL, judge, reward")
            print(
                "; ".join(f"{p['step']}: {', '.join(f'{float(p[n]):.2f}' for n in ('kl', 'gold', 'reward_model') if p[n])}" for p in shown)
            )


# ----------------------------------------------------------------------------------------------------------------- peers


def peers_of_pairs(rows: Sequence[Row], _: zipfile.ZipFile) -> None:
    """sft, reward and dpo beside TRL's trainers."""
    found = [(row["seed"], one) for row in rows if row["stage"] == "peers" and row["how"] == 0 for one in row["metrics"]["peers"]]
    lines: list[Sequence[Any]] = []
    for stage in dict.fromkeys(one["stage"] for _, one in found):
        own = [one for _, one in found if one["stage"] == stage]
        ours, theirs = (statistics.fmean(one[side] for one in own) for side in ("ours", "trl"))
        mean, limits = pooled([(one["difference"], one["ci95"]) for one in own])
        lines.append([stage, own[0]["measure"], ours, theirs, mean, bounds(limits), ", ".join(f"{one['difference']:+.3f}" for one in own)])
    if lines:
        table(["stage", "held-out", "ours", "TRL's", "difference", "95%", "each seed"], lines)


# ------------------------------------------------------------------------------------------------------------------ cost


def costs(rows: Sequence[Row]) -> None:
    """Seconds, memory and steps of each stage, as means over seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["how"] == 0:
            groups.setdefault((str(row["name"]).partition("-")[0], f"{policy_of(row)} {row['stage']}".lstrip("0123456789 ")), []).append(
                row
            )
    lines = []
    for (preset, stage), own in groups.items():
        seconds, gib = (statistics.fmean(row[name] for row in own) for name in ("seconds", "gib"))
        step = [row["cost"]["seconds"] for row in own if "seconds" in row.get("cost", {})]
        lines.append([preset, stage, len(own), f"{seconds:.0f}", f"{gib:.1f}", f"{statistics.fmean(step):.2f}" if step else ""])
    table(["preset", "stage", "runs", "seconds", "GiB", "seconds a step"], lines)


def bytes_again(rows: Sequence[Row]) -> None:
    """Whether what was run again has the weights of the first time."""
    first = {row["name"]: row.get("weights") for row in rows}
    lines = []
    for row in rows:
        name = str(row["name"]).replace("-again", "")
        if name != row["name"] and row.get("weights") and first.get(name):
            lines.append([name, "the same bytes" if first[name] == row["weights"] else "OTHER BYTES"])
    if lines:
        table(["stage", "weights of the second run"], lines)


if __name__ == "__main__":
    typer.run(main)
