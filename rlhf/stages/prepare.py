"""Stage prepare: read every source, put bad rows in quarantine, deal the others to slices, blend them by weight, write.

Makes data/prepared and metrics/prepare.json. Every random choice derives from params.seed and the name of the source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config import Params
from rlhf.config.data import WEIGHTED
from rlhf.data.examples import as_example, dialogue, first_of_each
from rlhf.data.fields import Turn
from rlhf.data.formats import BY_DESIGN, Quarantined, Row, read
from rlhf.data.split import blend, deal_sources, key_of, shared_prompts, shuffled, without_leaks
from rlhf.data.validate import Checker
from rlhf.errors import UserError
from rlhf.job import Job, run, write_lines

Slices = dict[str, list[Row]]


def main(job: Job) -> None:
    """Run the stage.

    Raises:
        UserError: a source cannot be read, loses too many rows to quarantine, or a slice that a stage needs is empty.
    """
    sources = job.params.data.sources
    checker = Checker(job.params.prepare.max_characters)
    good: dict[str, list[Row]] = {}
    bad: dict[str, list[Quarantined]] = {}
    for number, source in enumerate(sources):
        key, seed = f"data.sources.{number}", job.seed("sandbox", source.name)
        good[source.name], bad[source.name] = checker.divide(read(source, key, job.root, seed))
        job.say(told(source.name, good[source.name], bad[source.name]))
    check_quarantine(job, good, bad)

    dealt = deal_sources(good, sources, job.random)
    slices, leaked = without_leaks({name: shuffled(rows, job.random("order", name)) for name, rows in dealt.items()})
    job.say(", ".join(f"{name} {len(rows)}" for name, rows in slices.items()) + f"; {len(leaked)} training rows removed as held out")
    weights = {source.name: source.weight for source in sources}
    used = slices | {name: blend(slices[name], weights, partial(job.random, name)) for name in WEIGHTED}

    files = files_of(used)
    check_needs(job.params, files)
    for name, lines in files.items():
        write_lines(job.output(f"data/prepared/{name}.jsonl"), lines)
    write_lines(
        job.output("data/prepared/examples.jsonl"), map(as_example, first_of_each(row for rows in good.values() for row in rows).values())
    )
    write_quarantine(job.output("data/prepared/quarantine.jsonl"), bad)
    job.write_metrics(summary(good, bad, slices, leaked, used, files))


def told(name: str, good: Sequence[Row], bad: Sequence[Quarantined]) -> str:
    """What became of a source's rows, for people: what is not read of them, too."""
    reasons = Counter(row.category for row in bad).most_common()
    listed = f" ({', '.join(f'{reason} {count}' for reason, count in reasons)})" if reasons else ""
    fields = ", ".join(f"'{field}' ({count})" for field, count in sorted(unread(good).items()))
    return f"{name}: {len(good)} rows, {len(bad)} in quarantine{listed}" + (f"; not read: {fields}" if fields else "")


def unread(rows: Iterable[Row]) -> Counter[str]:
    """Columns and fields of turns that nothing reads, and how many rows have them."""
    return Counter(field for row in rows for field in row.unread)


def files_of(slices: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each file of data/prepared but the quarantine's."""
    held_out = slices["heldout"]
    first_of_prompt: dict[tuple[str, ...], Row] = {}
    for row in held_out:
        if row.kind != "text":
            first_of_prompt.setdefault(key_of(row), row)
    passages = [row for row in held_out if row.kind == "text"] or [row for row in held_out if row.chosen is not None]
    contents: dict[str, tuple[Iterable[Row], Callable[[Row], dict[str, Any]]]] = {
        "text": (slices["text"], as_text),
        "sft": (slices["sft"], lambda row: {"messages": dialogue(row)}),
        "reward": (slices["reward"], as_pair),
        "ppo": (slices["ppo"], as_prompt),
        "judge": (slices["judge"], as_pair),
        "heldout_text": (passages, as_text),
        "heldout_pairs": ((row for row in held_out if row.kind == "pairs"), as_pair),
        "heldout_prompts": (first_of_prompt.values(), as_prompt),
    }
    return {name: [render(row) for row in rows] for name, (rows, render) in contents.items()}


def as_text(row: Row) -> dict[str, Any]:
    turns = dialogue(row)
    # pretraining learns every word: it begins behind an answer that is not to be learnt
    first = max((place for place, turn in enumerate(turns, start=1) if turn["role"] == "assistant" and "weight" in turn), default=0)
    return {"text": row.text or "\n\n".join(map(said, turns[first:]))}


def said(turn: Turn) -> str:
    names = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return f"{names[turn['role']]}: " + "\n".join(filter(None, (turn["content"], *calls)))


def as_pair(row: Row) -> dict[str, Any]:
    return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}


def as_prompt(row: Row) -> dict[str, Any]:
    return {"prompt": row.prompt, "gold": row.gold}


def check_quarantine(job: Job, good: Mapping[str, Sequence[Row]], bad: Mapping[str, Sequence[Quarantined]]) -> None:
    """Refuse sources that lose too large a share of their rows.

    Raises:
        UserError: names each such source, its share and its commonest reasons, and where the rows can be read.
    """
    limit = job.params.prepare.max_quarantined_share
    complaints = []
    for name, rows in bad.items():
        total = len(rows) + len(good[name])
        damaged = [row for row in rows if row.category not in BY_DESIGN]
        if len(damaged) > limit * total:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(row.category for row in damaged).most_common(3))
            places = ", ".join(f"{row.file}:{row.line}" for row in damaged[:3])
            complaints.append(
                f"source '{name}' has {len(damaged)} bad rows of {total} ({len(damaged) / total:.1%}): {reasons}; the first: {places}"
            )
    if complaints:
        path = job.folder / "quarantine.jsonl"
        write_quarantine(path, bad)
        raise UserError(
            f"{'; '.join(complaints)}. prepare.max_quarantined_share allows {limit:.1%}",
            remedy=f"see each bad row and its reason in {path}; correct the data, or raise prepare.max_quarantined_share in params.yaml",
        )


def check_needs(params: Params, files: Mapping[str, Sequence[object]]) -> None:
    """Refuse to go on where a stage would find no rows.

    Raises:
        UserError: names the slice, and the keys that feed it.
    """
    needed = {"sft": "sft", "reward": "reward", "heldout_pairs": "heldout"}
    if params.algorithm == "ppo":
        needed["ppo"] = "ppo"
    if params.base.source == "build" or (params.algorithm == "ppo" and params.ppo.mixture_coefficient > 0):
        needed["text"] = "text"
    if not params.data.has_gold:
        needed["judge"] = "judge"
    for name, slice_name in needed.items():
        if not files[name]:
            feeding = [source for source in params.data.sources if source.split.uses(slice_name)]
            raise UserError(
                f"{name}.jsonl would be empty: no row of {', '.join(source.name for source in feeding)} was left for split.{slice_name} "
                "after quarantine and removal of held-out prompts",
                remedy=f"give these sources more rows, or a larger split.{slice_name} in params.yaml",
            )


def write_quarantine(path: Path, bad: Mapping[str, Sequence[Quarantined]]) -> None:
    # backslashreplace writes what UTF-8 cannot say as \udcXX, which JSON reads back as it was
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for rows in bad.values():
            file.writelines(json.dumps(vars(row), ensure_ascii=False, default=str) + "\n" for row in rows)


def summary(
    good: Mapping[str, Sequence[Row]],
    bad: Mapping[str, Sequence[Quarantined]],
    slices: Mapping[str, Sequence[Row]],
    leaked: Sequence[Row],
    used: Mapping[str, Sequence[Row]],
    files: Mapping[str, Sequence[object]],
) -> dict[str, Any]:
    """Where every row went: per source, rows = quarantined + leaked + its slices; `used` counts repetitions by weight."""
    leaked_of = Counter(row.source for row in leaked)
    sources = {}
    for name, rows in good.items():
        total = len(rows) + len(bad[name])
        sources[name] = {
            "rows": total,
            "quarantined": len(bad[name]),
            "quarantined_share": len(bad[name]) / total,
            "reasons": dict(sorted(Counter(row.category for row in bad[name]).items())),
            "unread": dict(sorted(unread(rows).items())),
            "leaked": leaked_of[name],
            "slices": {slice_name: sum(row.source == name for row in part) for slice_name, part in slices.items()},
            "used": {slice_name: sum(row.source == name for row in part) for slice_name, part in used.items()},
        }
    return {
        "rows": sum(source["rows"] for source in sources.values()),
        "quarantined": sum(len(rows) for rows in bad.values()),
        "leaked": len(leaked),
        "shared_prompts": shared_prompts(slices),
        "files": {name: len(lines) for name, lines in files.items()},
        "sources": sources,
    }


if __name__ == "__main__":
    run("prepare", main)
