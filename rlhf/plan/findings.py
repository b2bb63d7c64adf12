"""What a check of the plan has found: all that is wrong at once, and what it has seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlhf.errors import UserError


@dataclass
class Findings:
    """`problems` would fail a stage; `notes` are worth a look, and stop nothing; `seen` are things, and what was found of each."""

    problems: list[UserError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    memory: list[tuple[str, ...]] = field(default_factory=list)  # a row for each stage, in the order of memory.COLUMNS

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep what is wrong inside, and go on behind it."""
        try:
            yield
        except UserError as problem:
            self.problems.append(problem)

    def refuse(self) -> None:
        """End here where something is wrong.

        Raises:
            UserError: all of it, each with its remedy.
        """
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            each = "; ".join(f"{number}. {problem.what} — {problem.remedy}" for number, problem in enumerate(self.problems, start=1))
            what = f"{len(self.problems)} things are wrong: {each}"
            raise UserError(what, remedy="mend them all, then run again; `rlhf check` tells whether you have")
