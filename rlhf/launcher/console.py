"""Where a stage's lines go: log file and terminal."""

from __future__ import annotations

import re
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf.launcher import failures
from rlhf.redact import redact
from rlhf.workspace.find import is_deleted

LINES_SHOWN = 20
LINES_KEPT = 1000  # of those that tell of a failure
# what DeepSpeed and Gloo say of themselves
NOISE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|DEBUG)\] |\[Gloo\] Rank ")


class Console:
    """Where the stage's lines go: all to log.txt, those for people to the terminal, as a progress bar where there is one."""

    def __init__(self, stage: str, log: Path) -> None:
        self._stage, self._path = stage, log
        self._log = log.open("a", encoding="utf-8")
        self._last: deque[str] = deque(maxlen=LINES_SHOWN)
        self._told: deque[str] = deque(maxlen=LINES_KEPT)
        self._explained = self._unlogged = False
        self._step = re.compile(rf"{re.escape(self._stage)} (\d+)/(\d+) (\S*).*")
        bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        columns = (*bar, TextColumn("{task.fields[metric]}"))
        self._progress = Progress(*columns, disable=not sys.stdout.isatty())
        self._task = self._progress.add_task(self._stage, total=None, metric="", visible=False)

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        with suppress(OSError):  # what could not be written, as above
            self._log.close()

    def show(self, line: str) -> None:
        """Take one line of the stage."""
        line = redact(line)
        try:
            self._log.write(line + "\n")
            self._log.flush()
        except OSError as error:
            # the stage must not wait for a reader that has ended
            if not self._unlogged:
                print(f"warning: {self._path}: {error.strerror}; its lines are shown here only", file=sys.stderr, flush=True)
            self._unlogged = True
        if NOISE.match(line):
            return
        self._last.append(line)
        self._explained |= line.startswith("error: ")
        if failures.tells(line):
            self._told.append(line)
        step = self._step.fullmatch(line)
        if self._progress.disable:
            print(line, flush=True)
        elif step:
            self._progress.update(self._task, completed=int(step[1]), total=int(step[2]), metric=step[3], visible=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False)

    def explain(self, code: int) -> None:
        """Say that the stage failed, and why, where it has not said so itself."""
        lines = [] if self._explained else ["", f"the last lines of stage {self._stage}:", *self._last]
        killed = code in failures.KILLED
        ending = "before its end: one of its processes was killed (out of memory?)" if killed else f"with exit code {code}"
        if not self._explained and failures.may_pass(code, self._told):
            ending += f"; {failures.MAY_PASS}"
        where = "; DVC deletes its log" if is_deleted(self._path) else f"{failures.LOG}{self._path}"
        print("\n".join([*lines, f"stage {self._stage} ended {ending}{where}"]), file=sys.stderr, flush=True)
