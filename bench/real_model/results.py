"""Tables of what bench/real_model/seeds.py left: what was learnt, beside TRL's, what it cost, and whether a second run gave the same bytes.

python bench/real_model/results.py DIR
python bench/real_model/results.py DIR --samples 2    and so many held-out answers of each sort, before and after

Of several seeds there are two intervals (bench/real_model/intervals.py): one over held-out prompts, for these very models, and one over
runs, from as few values as there are seeds. Where seeds ask the same prompts (smollm2-135m-checkable), the first resamples prompts, each
with its mean over seeds. Where each seed deals the rows anew (smollm2-135m-hh), some prompts are held out by two seeds: they count as one.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.clone import REPOSITORY
from bench.real_model import intervals
from rlhf.registry import gates
from rlhf.workspace import presets

PARTS = 6  # of the course of training, each shown by its mean: a step has a few prompts, and swings
LONGEST = 160  # characters of a sample
FEW = 5  # words of an answer that hardly says anything

Row = dict[str, Any]


def main(
    folder: Annotated[Path, typer.Argument(help="What seeds.py wrote.")],
    samples: Annotated[int, typer.Option(help="Answers shown of each source that became right, became wrong and stayed wrong.")] = 0,
) -> None:
    """Print the tables, in Markdown."""
    rows = [json.loads(line) for line in (folder / "stages.jsonl").read_text(encoding="utf-8").splitlines()]
    with zipfile.ZipFile(folder / "files.zip") as archive:
        for part in (checkable, preferences, courses, peers_of_pairs):
            part(rows, archive)
        if samples:
            before_and_after(rows, archive, samples)
    costs(rows)
    bytes_again(rows)
    for row in rows:
        if row["how"] != 0:
            print(f"{row['name']}: {row['how']} {row['why']} after {row['seconds']:.0f} s, step {row.get('steps', 0)}")


def evaluations(rows: Sequence[Row], preset: str, policy: str) -> list[Row]:
    """The rows of stage evaluate of a preset and a branch (trl, or ppo_NAME of a variant, too), without those that were run again."""
    found = [row for row in rows if row["stage"] == "evaluate" and row["how"] == 0 and row["preset"].endswith(preset)]
    return sorted((row for row in found if "-again" not in row["name"] and policy_of(row) == policy), key=lambda row: int(row["seed"]))


def policy_of(row: Row) -> str:
    return str(row["name"]).partition(" ")[0].rpartition("-")[2]


def table(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    print("\n| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for line in lines:
        print("| " + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in line) + " |")


def bounds(interval: Sequence[float] | None, digits: int = 3) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if interval else ""


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
    apart = ["difference", "95% over prompts", "over runs", "each seed"]
    first = found["grpo"][0].values()
    sources, kinds = (sorted({of(line) for line in first}) for of in (source_of, kind_of))
    groups = [("all", lambda _: True), *((source, lambda line, source=source: source_of(line) == source) for source in sources)]
    of_kinds = [(kind, lambda line, kind=kind: kind_of(line) == kind) for kind in kinds]
    for heading, some in (("held-out", groups), ("kind", of_kinds)):
        table([heading, "n", "sft", "grpo", *apart], [[name, *risen(found["grpo"], among, "sft")] for name, among in some])
    of_instructions = [line for run in found["grpo"] for line in run.values() if not kind_of(line).startswith("sums")]
    table(["instructions followed", "right", f"of these in {FEW} words or fewer"], [brief(of_instructions, of) for of in ("sft", "grpo")])
    both = [
        {key: beside(line, theirs[key]) for key, line in answers_of(archive, ours).items()} for ours, theirs in beside_trl(rows, archive)
    ]
    if both:
        table(["held-out", "n", "TRL's", "grpo", *apart], [[name, *risen(both, among, "trl")] for name, among in groups])
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


def source_of(line: Row) -> str:
    return str(line["source"])


def kind_of(line: Row) -> str:
    return str(line["columns"]["kind"])


def risen(runs: Sequence[dict[str, Row]], among: Callable[[Row], bool], before: str) -> list[Any]:
    """How many prompts of a sort, both accuracies, their difference with its intervals over prompts and over runs, and that of each run."""
    keys = [key for key, line in runs[0].items() if among(line)]
    # (runs, prompts)
    first, after = (np.array([[statistics.fmean(run[key]["right"][name]) for key in keys] for run in runs]) for name in (before, "grpo"))
    apart = after - first
    each = [float(mean) for mean in apart.mean(1)]
    return [
        len(keys),
        *(float(of.mean()) for of in (first, after, apart)),
        bounds(intervals.over_prompts(apart.mean(0))),
        bounds(intervals.over_runs(each)),
        ", ".join(f"{one:+.3f}" for one in each),
    ]


def brief(lines: Sequence[Row], policy: str) -> list[Any]:
    """How many answers are right, and which share of them has few words: an instruction can be followed by saying nothing else."""
    right = [line["answers"][policy] for line in lines if line["right"][policy][0]]
    return [policy, f"{len(right)} of {len(lines)}", statistics.fmean(len(answer.split()) <= FEW for answer in right)]


def before_and_after(rows: Sequence[Row], archive: zipfile.ZipFile, number: int) -> None:
    """The first held-out answers of a seed that became right, became wrong, and stayed wrong, of each source."""
    run = next(iter(evaluations(rows, "checkable", "grpo")), None)
    if not run:
        return
    lines = [line for line in answers_of(archive, run).values() if len(line["prompt"]) == 1]
    shown = []
    for source, (after, before) in itertools.product(dict.fromkeys(map(source_of, lines)), ((True, False), (False, True), (False, False))):
        found = [one for one in lines if source_of(one) == source and (one["right"]["grpo"][0], one["right"]["sft"][0]) == (after, before)]
        shown += [
            [source, *map(short, (one["prompt"][0]["content"], *(marked(one, of) for of in ("sft", "grpo"))))] for one in found[:number]
        ]
    table(["held-out", "asked", f"sft, seed {run['seed']}", "grpo"], shown)


def marked(line: Row, policy: str) -> str:
    return f"{'right' if line['right'][policy][0] else 'wrong'}: {line['answers'][policy]}"


def short(text: str) -> str:
    """A text on one line of a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= LONGEST else line[:LONGEST] + " …"


# ----------------------------------------------------------------------------------------------------------- preferences


def preferences(rows: Sequence[Row], archive: zipfile.ZipFile) -> None:
    """The reward model (of dpo: the policy as one); and each algorithm's policy as the judge sees it."""
    prompts = held_out(rows, archive)
    for policy in dict.fromkeys(policy_of(row) for row in rows if row["stage"] == "evaluate" and row["preset"].endswith("hh")):
        found = evaluations(rows, "hh", policy)
        if not found:
            continue
        table(["seed", *MEASURES, "gates that fail"], [told(row) for row in found])
        measures: dict[str, Callable[[Row], tuple[float, Sequence[float]]]] = {
            "win rate": lambda m: (m["win_rate"]["value"], m["win_rate"]["ci95"]),
            "at equal length": lambda m: (m["win_rate"]["length_controlled"]["value"], m["win_rate"]["length_controlled"]["ci95"]),
            "implicit accuracy" if policy == "dpo" else "reward accuracy": lambda m: (
                m["reward_model"]["accuracy"],
                m["reward_model"]["accuracy_ci95"],
            ),
        }
        lines = []
        for name, measure in measures.items():
            values = [measure(row["metrics"]["evaluate"]) for row in found]
            among = partial(shared, [prompts.get(row["seed"]) for row in found])
            each = ", ".join(f"{value:.3f} ({bounds(own, 2)})" for value, own in values)
            means = [value for value, _ in values]
            lines.append([name, statistics.fmean(means), bounds(intervals.pooled(values, among)), bounds(intervals.over_runs(means)), each])
        table([policy, "mean", "95% over prompts", "over runs", "each seed"], lines)


def held_out(rows: Sequence[Row], archive: zipfile.ZipFile) -> dict[int, set[str]]:
    """The prompts that each seed holds out of the pairs."""
    found = [row for row in rows if row["stage"] == "evaluate" and row["how"] == 0 and row["preset"].endswith("hh")]
    return {
        row["seed"]: {json.dumps(json.loads(line)["prompt"]) for line in read(archive, row, "answers.jsonl").splitlines()} for row in found
    }


def shared(prompts: Sequence[set[str] | None], i: int, j: int) -> float:
    """The share of two seeds' prompts that both have; all, where it is not known."""
    one, other = prompts[i], prompts[j]
    return len(one & other) / math.sqrt(len(one) * len(other)) if one and other else 1.0


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
    """KL, the judge's score and the reward in the course of training; without the judge's where evaluate was cut off."""
    for preset, policy in (("hh", "ppo"), ("hh", "grpo"), ("checkable", "grpo")):
        judged = evaluations(rows, preset, policy)
        names = {row["name"].rpartition(" ")[0] for row in judged}
        trained = [
            row for row in rows if row["stage"] == policy and row["how"] == 0 and policy_of(row) == policy and "-again" not in row["name"]
        ]
        others = [row for row in trained if row["preset"].endswith(preset) and row["name"].rpartition(" ")[0] not in names]
        given = [(row, "gold_against_kl.csv", {"KL": "kl", "judge": "gold", "reward": "reward_model"}) for row in judged]
        given += [(row, f"{policy}.csv", {"KL": "kl", "reward": "score"}) for row in others]
        lines: list[list[Any]] = []
        parts: list[list[dict[str, str]]] = []
        for row, name, columns in given:
            steps = list(csv.DictReader(io.StringIO(read(archive, row, name))))
            parts = [steps[len(steps) * n // PARTS : len(steps) * (n + 1) // PARTS] for n in range(PARTS)]
            for heading, column in columns.items():
                means = [f"{statistics.fmean(float(step[column]) for step in part):.2f}" for part in parts]
                lines.append([f"{row['name'].partition(' ')[0]}, {heading}", *means])
        if lines:
            table(["means of steps", *(f"{part[0]['step']} to {part[-1]['step']}" for part in parts)], lines)


# ----------------------------------------------------------------------------------------------------------------- peers


def peers_of_pairs(rows: Sequence[Row], archive: zipfile.ZipFile) -> None:
    """sft, reward and dpo beside TRL's trainers."""
    found = [(row["seed"], one) for row in rows if row["stage"] == "peers" and row["how"] == 0 for one in row["metrics"]["peers"]]
    prompts = held_out(rows, archive)
    lines: list[Sequence[Any]] = []
    for stage in dict.fromkeys(one["stage"] for _, one in found):
        own = [(seed, one) for seed, one in found if one["stage"] == stage]
        ours, theirs, apart = ([one[side] for _, one in own] for side in ("ours", "trl", "difference"))
        limits = intervals.pooled(
            [(one["difference"], one["ci95"]) for _, one in own], partial(shared, [prompts.get(seed) for seed, _ in own])
        )
        each = ", ".join(f"{one:+.3f}" for one in apart)
        means = map(statistics.fmean, (ours, theirs, apart))
        lines.append([stage, own[0][1]["measure"], *means, bounds(limits), bounds(intervals.over_runs(apart)), each])
    if lines:
        table(["stage", "held-out", "ours", "TRL's", "difference", "95% over prompts", "over runs", "each seed"], lines)


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
