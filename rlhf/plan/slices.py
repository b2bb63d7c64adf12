"""Whether each stage will find rows: the sources that were read whole are dealt as stage prepare deals them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.config import Params
from rlhf.data.examine import entered
from rlhf.data.formats import Row, Seen
from rlhf.data.table import Table
from rlhf.job import Job, read_lines
from rlhf.plan.findings import Findings
from rlhf.stages.prepare import deal_and_blend, lacking, rows_of_files, too_few_pairs, too_few_prompts

FEW = 10
_SPREAD = ": {policy}, which takes the spread of rewards from them, may stop as diverged"


def job(root: Path, params: Params) -> Job:
    """Stage prepare's, for what it draws."""
    return Job("prepare", params, root, root, "cpu", 0, 1, 0)


def check_prepared(root: Path, params: Params, findings: Findings) -> None:
    """Look for too few prompts where stage prepare is up to date."""
    paths = [root / "data" / "prepared" / f"{name}.jsonl" for name in ("ppo", "reward")]
    if params.prompts_needed > 1 and all(path.is_file() for path in paths):
        prompts, given = ({json.dumps(row["prompt"]) for row in read_lines(path)} for path in paths)
        errors = too_few_prompts(params, len(prompts)), too_few_pairs(params, len(given - prompts))
        findings.problems += [error for error in errors if error]


def check(root: Path, params: Params, known: Mapping[int, Sequence[Row]], findings: Findings) -> None:
    """Look for slices that would be empty.

    Args:
        known: all good rows of a source, by its number. Of what other sources feed too, nothing is said: their rows can only add to it.
    """
    sources = params.data.sources
    if not known:
        return
    with tempfile.TemporaryDirectory() as folder, Table(Path(folder) / "rows") as table:
        for number, rows in known.items():
            table.begin(number, sources[number].name)
            table.add(entered(rows, params.prepare.max_characters, Seen()))
        table.close()
        good = {source.name: table.good(number) for number, source in enumerate(sources)}
        _, _, used = deal_and_blend(job(root, params), table, good)
        names = {sources[number].name for number in known}
        files = rows_of_files(used, table)
        wrong = lacking(params, files, table, good)
        findings.problems += [error for feeding, error in wrong if names >= {source.name for source in feeding}]
        pairs = {source.name for source in params.data.feeding("heldout") if source.kind == "pairs"}
        if names >= pairs and 0 < (count := len(files["heldout_pairs"])) < FEW:
            spread = "" if params.policy == "dpo" else _SPREAD.format(policy=params.policy)
            findings.notes.append(f"heldout_pairs.jsonl would have {count} rows, and what is measured on so few says little{spread}")
