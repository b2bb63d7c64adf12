"""Whether each reward function and service can be asked: they are, for an answer to a row of each source, before anything trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config import Params
from rlhf.config.rewards import CheckedReward
from rlhf.data.formats import Row, read
from rlhf.data.prepared import as_prompt
from rlhf.errors import UserError
from rlhf.plan.findings import Findings
from rlhf.rewards.scoring import Checkers, checked, scores_row

LOOKED_AT = 50  # rows of a source: one of them will be good
SAID = 40  # characters of an answer
SAMPLE = "I do not know."


def check(root: Path, params: Params, findings: Findings) -> None:
    """Ask each entry of section rewards, but a model."""
    entries = checked(params.rewards)
    if not entries:
        return
    rows = list(_rows(root, params))
    for entry in entries:
        mine = [row for row in rows if scores_row(entry, row)]
        if mine:
            with findings.collecting():
                _ask(root, entry, mine, findings)
        else:
            findings.notes.append(f"reward '{entry.name}': no row of its sources could be read to try it on")


def _rows(root: Path, params: Params) -> Iterator[dict[str, Any]]:
    """The first good row of each source that prompts are taken from, as prepare would write it."""
    taken = ("ppo", "reward") if params.pairs_needed else ("ppo",)
    for number, source in enumerate(params.data.sources):
        if not any(map(source.split.uses, taken)):
            continue
        try:
            for row, _ in zip(read(source, f"data.sources.{number}", root, 0), range(LOOKED_AT), strict=False):
                if isinstance(row, Row):
                    yield as_prompt(row)
                    break
        except UserError:
            continue  # of which the check of the rows tells


def _ask(root: Path, entry: CheckedReward, rows: list[dict[str, Any]], findings: Findings) -> None:
    answers = [reference if isinstance(reference := row.get("reference"), str) else SAMPLE for row in rows]
    checkers = Checkers([entry], root)
    try:
        outcomes = checkers.score(rows, answers)[entry.name]
    finally:
        checkers.close()
    for answer, outcome in zip(answers, outcomes, strict=True):
        if outcome.failure is not None:
            last = outcome.failure.strip().splitlines()[-1]
            what = f"reward '{entry.name}' fails on the answer {answer[:SAID]!r} to the first row of a source: {last}"
            raise UserError(what, remedy="mend the function or service, or name in its `sources` those whose rows it is for")
    said = ", ".join(f"{outcome.score:g} for {answer[:SAID]!r}" for answer, outcome in zip(answers, outcomes, strict=True))
    findings.seen.append((f"reward {entry.name}", said))
