"""All rewards but the model's: what each entry of section rewards gives some answers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.rewards import CheckedReward, FunctionReward, RewardEntry
from rlhf.errors import UserError
from rlhf.rewards import service
from rlhf.rewards.processes import Functions

MOST_PROCESSES = 16
Row = Mapping[str, Any]  # a line of data/prepared/ppo.jsonl or heldout_prompts.jsonl


@dataclass(frozen=True)
class Outcome:
    """What an entry gave an answer."""

    score: float
    failure: str | None = None  # why the score is the entry's failure_score
    asked: bool = True  # whether the entry scores answers to such a row at all


@dataclass
class Checkers:
    """The entries that are functions or services, ready to be asked.

    Args:
        ranks: of the machine, which share its cores.
        kept: where copies of the functions' files may be, which are read in their place.
    """

    entries: Sequence[CheckedReward]
    root: Path
    ranks: int = 1
    kept: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # that each entry took
    _functions: Functions | None = None
    _thread: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, entries: Sequence[RewardEntry], root: Path, ranks: int = 1, kept: Path | None = None) -> Checkers:
        return cls(checked(entries), root, ranks, kept)

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, list[Outcome]]:
        """What each entry gives an answer to each row, by the entry's name.

        Raises:
            UserError: a function cannot be loaded.
        """
        return {entry.name: self._of(entry, rows, answers) for entry in self.entries}

    def begin(self, rows: Sequence[Row], answers: Sequence[str]) -> Future[dict[str, list[Outcome]]]:
        """As `score`, while the caller does something else."""
        if self._thread is None:  # one, that stays: processes end with the thread that started them
            self._thread = ThreadPoolExecutor(1)
        return self._thread.submit(self.score, rows, answers)

    def votes(self, name: str, rows: Sequence[Row], answers: Sequence[str]) -> list[str]:
        """What two answers have in common that come to one result, as the function of an entry sees it."""
        entry = next(entry for entry in self.entries if entry.name == name)
        if not isinstance(entry, FunctionReward):
            from rlhf.rewards.answers import normalised

            return [normalised(answer) for answer in answers]
        calls = [_asked(row, answer) | {"entry": name, "vote": True} for row, answer in zip(rows, answers, strict=True)]
        return [reply.get("vote", "") for reply in self.functions.call(calls)]

    def _of(self, entry: CheckedReward, rows: Sequence[Row], answers: Sequence[str]) -> list[Outcome]:
        started = time.monotonic()
        numbers = [number for number, row in enumerate(rows) if scores_row(entry, row)]
        asked = [_asked(rows[number], answers[number]) for number in numbers]
        if isinstance(entry, FunctionReward):
            replies = self.functions.call([one | {"entry": entry.name, "vote": False} for one in asked])
        else:
            replies = service.scores(entry, asked)
        found = [Outcome(0.0, asked=False)] * len(rows)
        for number, reply in zip(numbers, replies, strict=True):
            failed = "error" in reply
            found[number] = Outcome(entry.failure_score, reply["error"]) if failed else Outcome(reply["score"])
        self.seconds[entry.name] = self.seconds.get(entry.name, 0.0) + time.monotonic() - started
        return found

    @property
    def functions(self) -> Functions:
        if self._functions is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            functions = [entry for entry in self.entries if isinstance(entry, FunctionReward)]
            self._functions = Functions(functions, self.root, max(1, min(MOST_PROCESSES, cores // self.ranks)), self.kept)
        return self._functions

    def close(self) -> None:
        if self._functions is not None:
            self._functions.close()
            self._functions = None
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def checked(entries: Sequence[RewardEntry]) -> list[CheckedReward]:
    """The entries that are no model."""
    return [entry for entry in entries if entry.kind != "model"]


def scores_row(entry: CheckedReward, row: Row) -> bool:
    """Whether an entry scores answers to a row, by its source."""
    return entry.sources is None or row.get("source") in entry.sources


def _asked(row: Row, answer: str) -> dict[str, Any]:
    return {"prompt": row["prompt"], "answer": answer, "reference": row.get("reference"), "columns": row.get("columns", {})}


def check_failures(entries: Sequence[CheckedReward], outcomes: Mapping[str, Sequence[Outcome]], where: str) -> None:
    """Check that no entry failed on too many answers.

    Args:
        where: it was asked, for the message.

    Raises:
        UserError: names the entry, its share and its first failure.
    """
    for entry in entries:
        asked = [outcome for outcome in outcomes[entry.name] if outcome.asked]
        failures = [outcome.failure for outcome in asked if outcome.failure is not None]
        if asked and len(failures) > entry.max_failed_share * len(asked):
            share = f"{len(failures)} of {len(asked)} answers, more than max_failed_share ({entry.max_failed_share:g}) allows"
            what = entry.function if isinstance(entry, FunctionReward) else entry.url
            raise UserError(
                f"{where}: reward '{entry.name}' ({what}) failed on {share}; the first time: {failures[0].strip().splitlines()[-1]}",
                remedy="see its traceback in the log, and mend the function or service; a rerun goes on from the last checkpoint",
            )


def first_failures(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, str]:
    """The first failure of each entry that had one, in full."""
    found = {name: next((one.failure for one in rows if one.failure is not None), None) for name, rows in outcomes.items()}
    return {name: failure for name, failure in found.items() if failure is not None}
