"""The bars of `rlhf run`: one for each stage and one for all, with what is told of a stage that was stopped; and how soon it speaks."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from rlhf.cli import progress
from tasks import stage
from tasks.stage import Progress

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def watchers(monkeypatch: pytest.MonkeyPatch) -> list[stage.Watcher]:
    found: list[stage.Watcher] = []
    monkeypatch.setattr(stage, "_watchers", found)
    return found


def lines(written: io.StringIO) -> dict[str, list[str]]:
    """What stands last on the terminal in the row of each name."""
    rows = [line.split() for line in re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", written.getvalue()).replace("\r", "\n").splitlines()]
    return {row[0]: row for row in rows if row}


@contextmanager
def terminal(root: Path) -> Iterator[io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, color_system=None, width=120)
    with progress.shown(console, root):
        yield written


def tell(*events: Progress) -> None:
    for event in events:
        for watcher in stage._watchers:
            watcher(event)


def test_one_bar_for_all_counts_stages_by_the_time_they_took(tmp_path: Path) -> None:
    for name, seconds in (("sft", 30), ("ppo", 90)):
        folder = tmp_path / "runs" / name / "f00d"
        folder.mkdir(parents=True)
        (folder / "tracking.json").write_text(json.dumps({"started": 1000, "ended": 1000 + 1000 * seconds}), encoding="utf-8")
    with terminal(tmp_path) as written:
        tell(*(Progress(name, "waiting") for name in ("base", "sft", "ppo")))
        tell(Progress("base", "up to date"), Progress("sft", "running", "loss=2.5", 4, 4), Progress("sft", "done"))
    rows = lines(written)
    assert "25%" in rows["all"]
    assert rows["all"][-4:] == ["2", "of", "3", "stages"]
    assert "left" in rows["sft"]
    assert (rows["base"][-3:], rows["sft"][-1], rows["ppo"][-1]) == (["up", "to", "date"], "done", "waiting")


def test_what_was_under_way_is_shown_as_stopped(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), terminal(tmp_path) as written:
        tell(Progress("sft", "running", "loss=2.5", 3, 12), Progress("ppo", "waiting"))
        raise KeyboardInterrupt
    rows = lines(written)
    assert ("3/12" in rows["sft"], rows["sft"][-1], rows["ppo"][-1]) == (True, "stopped", "waiting")


def test_the_first_line_comes_before_the_slow_imports(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    words = [sys.executable, "-X", "importtime", "-c", "from rlhf.cli.main import main; main()", "run"]
    with subprocess.Popen(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr
        said = []
        for line in run.stderr:
            said.append(line)
            if line.startswith(f"{tmp_path}: starting"):
                break
        for process in psutil.Process(run.pid).children(recursive=True):
            process.kill()
        run.kill()
    assert said[-1].startswith(f"{tmp_path}: starting")
    assert [line for line in said if line.split()[-1].partition(".")[0] in ("prefect", "mlflow", "dvc", "torch")] == []
