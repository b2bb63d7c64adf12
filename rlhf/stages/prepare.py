"""Stage prepare: read every source, put bad rows in quarantine, deal the others to slices, blend them by weight, write.

Makes data/prepared and metrics/prepare.json. Every random choice derives from params.seed and the name of the source. All cores read
and write; what is read lies in a file of the stage's folder, and in memory are some dozens of bytes for each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import STORED, Params
from rlhf.config.data import WEIGHTED, Source
from rlhf.data.cores import Cores
from rlhf.data.examine import batches, examine
from rlhf.data.examples import as_example
from rlhf.data.foreign import mend
from rlhf.data.formats import Seen, files_of
from rlhf.data.prepared import Render, as_messages, as_pair, as_prompt, as_text, lines_of, refused_lines
from rlhf.data.split import Numbers, blend, deal_sources, one_of_each_prompt, shared_prompts, shuffled, without_leaks
from rlhf.data.table import Table
from rlhf.errors import UserError
from rlhf.job import Job, run

RENDER: dict[str, Render] = {
    "text": as_text,
    "sft": as_messages,
    "reward": as_pair,
    "ppo": as_prompt,
    "judge": as_pair,
    "heldout_text": as_text,
    "heldout_pairs": as_pair,
    "heldout_prompts": as_prompt,
}


def main(job: Job) -> None:
    """Run the stage.

    Raises:
        UserError: a source cannot be read, loses too many rows to quarantine, or a slice that a stage needs is empty.
    """
    sources = job.params.data.sources
    with Cores() as cores, Table(job.folder / "rows") as table:
        read_sources(job, cores, table)
        good = {source.name: table.good(number) for number, source in enumerate(sources)}
        bad = {source.name: table.bad(number) for number, source in enumerate(sources)}
        for name, rows in good.items():
            job.say(told(name, table, rows, bad[name]))
        check_quarantine(job, cores, table, good, bad)

        slices, leaked, used = deal_and_blend(job, table, good)
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in slices.items())
        job.say(f"{sizes}; {len(leaked)} training rows removed as held out")

        files = rows_of_files(used, table)
        check_needs(job.params, files, table, good)
        for name, rows in files.items():
            write(job.output(f"data/prepared/{name}.jsonl"), cores.in_order(lines_of, table.extracts(rows, RENDER[name])))
        examples = table.first_of_each_form(np.concatenate(list(good.values())))
        write(job.output("data/prepared/examples.jsonl"), cores.in_order(lines_of, table.extracts(examples, as_example)))
        write_quarantine(job.output("data/prepared/quarantine.jsonl"), cores, table, bad)
        job.write_metrics(summary(table, good, bad, slices, leaked, used, files))


def read_sources(job: Job, cores: Cores, table: Table) -> None:
    """Fill the table."""
    for number, source in enumerate(job.params.data.sources):
        key, seed = f"data.sources.{number}", job.seed("sandbox", source.name)
        for file, records in files_of(source, key, job.root, seed):
            table.begin(number, file)
            seen = Seen()
            for examined in cores.in_order(examine, batches(source, file, records, job.params.prepare.max_characters)):
                table.add(examined)
                seen.add(examined.seen)
            seen.check(source, key, file)
    table.close()


def told(name: str, table: Table, good: Numbers, bad: Numbers) -> str:
    """What became of a source's rows, for people: what is not read of them, too."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(table.reasons(bad)).most_common())
    fields = ", ".join(f"'{field}' ({count})" for field, count in table.unread(good).items())
    listed, not_read = f" ({reasons})" if reasons else "", f"; not read: {fields}" if fields else ""
    return f"{name}: {len(good)} rows, {len(bad)} in quarantine{listed}{not_read}"


def deal_and_blend(job: Job, table: Table, good: Mapping[str, Numbers]) -> tuple[dict[str, Numbers], Numbers, dict[str, Numbers]]:
    """The slices, the training rows removed as held out, and the slices as they are used: each row as often as its source's weight says."""
    sources = job.params.data.sources
    dealt = deal_sources(good, table.prompt, sources, job.random)
    slices, leaked = without_leaks({name: shuffled(rows, job.random("order", name)) for name, rows in dealt.items()}, table.prompt)
    weights = {source.name: source.weight for source in sources}
    used = slices | {name: blend(slices[name], table.source, weights, partial(job.random, name)) for name in WEIGHTED}
    return slices, leaked, used


def rows_of_files(slices: Mapping[str, Numbers], table: Table) -> dict[str, Numbers]:
    """The rows of each file of data/prepared but the examples' and the quarantine's."""
    held_out = slices["heldout"]
    dialogues, passages = table.dialogues(held_out), table.passages(held_out)
    return {
        "text": slices["text"],
        "sft": slices["sft"],
        "reward": slices["reward"],
        "ppo": slices["ppo"],
        "judge": slices["judge"],
        "heldout_text": passages if len(passages) else table.answered(held_out),
        "heldout_pairs": table.pairs(held_out),
        "heldout_prompts": one_of_each_prompt(dialogues, table.prompt),
    }


def check_quarantine(job: Job, cores: Cores, table: Table, good: Mapping[str, Numbers], bad: Mapping[str, Numbers]) -> None:
    """Refuse sources that lose too large a share of their rows.

    Raises:
        UserError: names each such source, its share and its commonest reasons, and where the rows can be read.
    """
    limit = job.params.prepare.max_quarantined_share
    complaints, all_reasons, hopeless = [], set[str](), False
    for name, rows in bad.items():
        total = len(rows) + len(good[name])
        damaged = table.damaged(rows)
        if len(damaged) > limit * total:
            all_reasons |= table.reasons(damaged).keys()
            hopeless = hopeless or not len(good[name])
            reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(table.reasons(damaged)).most_common(3))
            places = ", ".join("{}:{}".format(*table.place(row)) for row in damaged[:3])
            complaints.append(
                f"source '{name}' has {len(damaged)} bad rows of {total} ({len(damaged) / total:.1%}): {reasons}; the first: {places}"
            )
    if complaints:
        path = job.folder / "quarantine.jsonl"
        write_quarantine(path, cores, table, bad)
        raise UserError(
            f"{'; '.join(complaints)}. prepare.max_quarantined_share allows {limit:.1%}",
            remedy=f"see each bad row and its reason in {path}; {mend(all_reasons, all_rows=hopeless)}",
        )


def check_needs(params: Params, files: Mapping[str, Numbers], table: Table, good: Mapping[str, Numbers]) -> None:
    """Refuse to go on where a stage would find no rows.

    Raises:
        UserError: names each such slice, and the keys that feed it.
    """
    errors = [error for _, error in lacking(params, files, table, good)]
    if errors:
        raise UserError("; ".join(error.what for error in errors), remedy="; ".join(error.remedy for error in errors))


def lacking(
    params: Params, files: Mapping[str, Numbers], table: Table, good: Mapping[str, Numbers]
) -> list[tuple[list[Source], UserError]]:
    """What is wrong where a stage would find no rows, each with the sources that could give it some."""
    needed = {"sft": "sft", "heldout_prompts": "heldout"}
    if params.reads_pairs:
        needed |= {"reward": "reward", "heldout_pairs": "heldout"}
    if params.policy != "dpo":
        needed["ppo"] = params.policy
    if params.base.source == "build" or (params.policy != "dpo" and params.answering.mixture_coefficient > 0):
        needed["text"] = "text"
    if params.policy in STORED and params.answers.pairs:
        needed["reward"] = "reward"
    if params.trains_judge:
        needed["judge"] = "judge"
    found = []
    for name, slice_name in needed.items():
        if not len(files[name]):
            feeding = [source for source in params.data.feeding(slice_name) if name != "heldout_pairs" or source.kind == "pairs"]
            names = ", ".join(source.name for source in feeding)
            prompts = len(np.unique(table.prompt[np.concatenate([good[source.name] for source in feeding])]))
            what = f"{name}.jsonl would be empty: no row of {names} was left for split.{slice_name} "
            what += f"after quarantine and removal of held-out prompts (different prompts: {prompts}; all rows of one go to one slice)"
            remedy = f"give {names} rows with more prompts, or a larger split.{slice_name} in params.yaml"
            found.append((feeding, UserError(what, remedy=remedy)))
    prompts = len(np.unique(table.prompt[files["ppo"]]))
    if prompts and (error := too_few_prompts(params, prompts)):
        found.append((params.data.feeding("ppo"), error))
    given = len(np.setdiff1d(table.prompt[files["reward"]], table.prompt[files["ppo"]]))
    if len(files["reward"]) and (error := too_few_pairs(params, given)):
        found.append((params.data.feeding("reward"), error))
    return found


def too_few_prompts(params: Params, prompts: int) -> UserError | None:
    """What is wrong where there are too few different prompts for all rounds."""
    if prompts >= params.prompts_needed:
        return None
    many = f"{params.rounds} rounds with answers.prompts {params.answers.prompts} each, and answers.heldout_prompts"
    asked = f"{many} {params.answers.heldout_prompts} kept apart," if params.policy == "iterative" else "answers.prompts"
    what = f"ppo.jsonl has {prompts} different prompts, but {asked} ask for {params.prompts_needed}"
    fewer = ", or fewer iterative.rounds" if params.policy == "iterative" else ""
    return UserError(what, remedy=f"give more prompts (split.ppo), lower answers.prompts{fewer}")


def too_few_pairs(params: Params, prompts: int) -> UserError | None:
    """What is wrong where too few prompts of preference pairs are no other prompts."""
    if prompts >= params.pairs_needed:
        return None
    what = f"reward.jsonl has {prompts} different prompts that are not in ppo.jsonl, but answers.pairs {params.answers.pairs}"
    what += f" in each of {params.rounds} rounds asks for {params.pairs_needed}"
    return UserError(what, remedy="give more pairs (split.reward), or lower answers.pairs")


def write_quarantine(path: Path, cores: Cores, table: Table, bad: Mapping[str, Numbers]) -> None:
    write(path, cores.in_order(refused_lines, table.refused(np.concatenate(list(bad.values())))))


def write(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(parts)


def summary(
    table: Table,
    good: Mapping[str, Numbers],
    bad: Mapping[str, Numbers],
    slices: Mapping[str, Numbers],
    leaked: Numbers,
    used: Mapping[str, Numbers],
    files: Mapping[str, Numbers],
) -> dict[str, Any]:
    """Where every row went: per source, rows = quarantined + leaked + its slices; `used` counts repetitions by weight."""
    sources = {}
    for number, (name, rows) in enumerate(good.items()):
        total = len(rows) + len(bad[name])
        sources[name] = {
            "rows": total,
            "quarantined": len(bad[name]),
            "quarantined_share": len(bad[name]) / total,
            "reasons": dict(sorted(table.reasons(bad[name]).items())),
            "unread": table.unread(rows),
            "leaked": table.count(leaked, number),
            "slices": {slice_name: table.count(part, number) for slice_name, part in slices.items()},
            "used": {slice_name: table.count(part, number) for slice_name, part in used.items()},
        }
    return {
        "rows": sum(source["rows"] for source in sources.values()),
        "quarantined": sum(map(len, bad.values())),
        "leaked": len(leaked),
        "shared_prompts": shared_prompts(slices, table.prompt),
        "files": {name: len(rows) for name, rows in files.items()},
        "sources": sources,
    }


if __name__ == "__main__":
    run("prepare", main)
