"""Many stages side by side: which runs when, what a failure takes along, and the numbers of the tables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bench.real_model import results, seeds
from bench.real_model.side_by_side import CUT_OFF, SKIPPED, End, Start, Task, on_processor, run_all


def task(folder: Path, name: str, program: str, *after: str, gib: float = 0.0, late: int = 0) -> Task:
    def start() -> Start:
        return Start([sys.executable, "-S", "-c", program], folder, os.environ, folder / f"{name}.log")

    return Task(name, start, after, gib, late)


def ends(tasks: list[Task], together: int = 4, room: float = 10.0, seconds: float = 30.0) -> dict[str, End]:
    found: dict[str, End] = {}
    run_all(tasks, together, room, seconds, lambda task, end: found.update({task.name: end}), on_processor)
    return found


def test_a_failure_takes_along_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    def refuse() -> Start:
        raise FileNotFoundError("no model")

    found = ends(
        [
            task(tmp_path, "last", "", "second"),
            task(tmp_path, "second", "", "first"),
            task(tmp_path, "first", "print('why'); raise SystemExit(3)"),
            task(tmp_path, "other", "open('there', 'w')"),
            task(tmp_path, "after", "open('there')", "other"),
            Task("unready", refuse),
        ]
    )
    assert {name: end.how for name, end in found.items()} == {
        "first": 3,
        "second": SKIPPED,
        "last": SKIPPED,
        "other": 0,
        "after": 0,
        "unready": SKIPPED,
    }
    assert found["second"].why == "without first"
    assert found["unready"].why == "FileNotFoundError: no model"
    assert (tmp_path / "first.log").read_text() == "why\n"


def test_what_is_late_lets_the_others_begin(tmp_path: Path) -> None:
    pause = "import time; time.sleep(0.3)"
    chain = [task(tmp_path, "first", pause), task(tmp_path, "second", pause, "first"), task(tmp_path, "third", pause, "second")]
    found = ends([task(tmp_path, "late", "", late=1), *chain])
    assert found["first"].began < found["second"].began <= found["late"].began < found["third"].began


def test_at_the_deadline_all_ends(tmp_path: Path) -> None:
    sleeping = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])"
    found = ends([task(tmp_path, "long", sleeping, gib=8), task(tmp_path, "wide", "", gib=8)], seconds=3.0)
    assert [found[name].how for name in ("long", "wide")] == [CUT_OFF, SKIPPED]
    assert found["long"].gib > 0


def test_every_stage_waits_for_stages_that_are_there(tmp_path: Path) -> None:
    plan = seeds.planned(tmp_path, [1, 2], "", (), seeds.Chosen(True, 7, True, ("hh ppo hot ppo.steps=9",)))
    names = [stage.name for stage in plan]
    assert len(set(names)) == len(names)
    assert {name for stage in plan for name in stage.after} <= set(names)
    assert {stage.name for stage in plan if stage.module} == {
        "hh-1 peers",
        "hh-2 peers",
        "checkable-1-trl grpo",
        "checkable-2-trl grpo",
    }
    assert {stage.name for stage in plan if "ppo.steps=9" in stage.values} == {
        f"hh-{n}-ppo_hot {stage}" for n in (1, 2) for stage in ("ppo", "evaluate")
    }
    folders = [stage.folder for stage in plan]
    assert len(set(folders)) == len(folders)


def test_what_a_stage_logged_is_told_by_its_median(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert seeds.steps_of(path) == {}
    lines = [{"step": step, "metrics": {"reward": 0.5, "seconds": seconds}} for step, seconds in enumerate((9.0, 1.0, 2.0), start=1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seeds.steps_of(path) == {"steps": 3, "last": {"reward": 0.5, "seconds": 2.0}, "cost": {"seconds": 2.0}}


def test_how_much_accuracy_rose_is_the_mean_over_runs_of_each_prompt() -> None:
    def run(*after: bool) -> dict[str, results.Row]:
        return {str(i): {"source": "ab"[i % 2], "right": {"sft": [False], "grpo": [right]}} for i, right in enumerate(after)}

    runs = [run(True, False, True, False), run(True, True, False, False)]

    def of_a(line: results.Row) -> bool:
        return line["source"] == "a"

    assert results.risen(runs, lambda _: True, "sft")[:4] == [4, 0.0, 0.5, 0.5]
    assert results.risen(runs, of_a, "sft")[:4] == [2, 0.0, 0.75, 0.75]
    assert results.risen(runs, of_a, "sft")[-1] == "+1.000, +0.500"
