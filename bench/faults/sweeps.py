"""SIGKILL of a sweep at random moments: every point must end as in a sweep that nothing disturbed, no stage be run twice to its end.

python bench/faults/sweeps.py               ten kills of a sweep of three points, two at a time: ten minutes on two cores
python bench/faults/sweeps.py --kills 30

A kill hits the sweep itself, a `dvc repro` of it, or everything at once, as a power cut does. What is hit is started again.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from bench.clone import REPOSITORY, machine
from bench.faults.workspace import PATIENCE, SMALL, Workspace, until

SPACE = """
name: killed
method: grid
points: 3
values:
  ppo.kl.coefficient: [0.05, 0.1, 0.2]
"""
LONGEST_WAIT = 20.0  # seconds before a kill
VICTIMS = ("sweep", "dvc", "everything")


def main(
    kills: Annotated[int, typer.Option(help="How many.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments and victims.")] = 1,
    output: Annotated[Path, typer.Option(help="Where to write the findings.")] = REPOSITORY / "bench" / "sweeps.json",
) -> None:
    """Kill a sweep again and again, and compare what comes out. Exit code 1: other bytes, or a stage that was trained twice."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-sweeps-"))
    try:
        undisturbed = workspace(folder / "undisturbed")
        undisturbed.run("rlhf", "sweep", "space.yaml", "--jobs", "2")
        found = disturb(workspace(folder / "killed"), kills, random.Random(seed))
        found["same"] = trees(undisturbed) == found.pop("trees")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=2))
    output.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n", encoding="utf-8")
    if not found["same"] or found["twice"]:
        raise typer.Exit(1)


def workspace(folder: Path) -> Workspace:
    place = Workspace(folder)
    place.run("rlhf", "use", "sandbox", *SMALL)
    (place.root / "space.yaml").write_text(SPACE, encoding="utf-8")
    return place


def disturb(place: Workspace, kills: int, chance: random.Random) -> dict[str, Any]:
    """Run a sweep with so many kills, anew where it ends before they are made; what was found."""
    victims = dict.fromkeys(VICTIMS, 0)
    rounds, twice, began = 1, 0, time.monotonic()
    process = start(place)
    while True:
        if sum(victims.values()) < kills:
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.5, LONGEST_WAIT))
            if process.poll() is None:
                victim = chance.choice(VICTIMS)
                victims[victim] += kill(place, process, victim)
        elif process.poll() is None:
            process.wait(PATIENCE)
        if process.poll() is None:
            continue  # a dvc that was killed is tried again by the sweep
        if process.returncode == 0:
            twice += ended_twice(place, lambda tags: (tags["fingerprint"], tags["mlflow.parentRunId"]))
            if sum(victims.values()) >= kills:
                break
            shutil.rmtree(place.root / ".dvc" / "cache")  # once more from the beginning
            rounds += 1
            process = start(place, "--anew")
        else:
            process = start(place)
    nothing = subprocess.run(
        ["rlhf", "sweep", "space.yaml"], cwd=place.root, env=place.environment, capture_output=True, text=True, check=False
    )
    until(lambda: not place.processes(), "processes are left")
    return {
        "kills": victims,
        "rounds": rounds,
        "twice": twice,
        "again": "nothing to do" in nothing.stdout,
        "seconds": time.monotonic() - began,
        "trees": trees(place),
    }


def start(place: Workspace, *words: str) -> subprocess.Popen[bytes]:
    return place.start("rlhf", "sweep", "space.yaml", "--jobs", "2", *words)


def kill(place: Workspace, process: subprocess.Popen[bytes], victim: str) -> int:
    """Kill one process of a sweep, or all; 1, or 0 where there was none."""
    if victim == "everything":
        place.kill_all()
        process.wait()
        return 1
    found = [process.pid] if victim == "sweep" else [one.pid for one in place.find("dvc")]
    with suppress(psutil.NoSuchProcess, IndexError):
        psutil.Process(found[-1]).send_signal(signal.SIGKILL)
        if victim == "sweep":
            process.wait()
        return 1
    return 0


def trees(place: Workspace) -> dict[str, str]:
    """The values, numbers and hashes of each experiment's models, by its name."""
    words = ["git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps"]
    names = subprocess.run(words, cwd=place.root, capture_output=True, text=True, check=True).stdout.split()
    found = {}
    for name in names:
        reference = next(iter(re.findall(r"\S+", _git(place, "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}"))))
        listed = _git(place, "ls-tree", "-r", reference, "params.yaml", "dvc.yaml", "metrics", "plots")
        # stages that ran side by side stand in dvc.lock in the order in which they ended
        found[name] = listed + "".join(sorted(_git(place, "show", f"{reference}:dvc.lock").splitlines()))
    return found


def ended_twice(place: Workspace, key: Callable[[Mapping[str, str]], object]) -> int:
    """How many stages came to their end more than once in MLflow.

    Args:
        key: by which two runs of a stage are the same, from their tags.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place.root}/mlruns/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "attributes.status = 'FINISHED'")
    ended = [key(run.data.tags) for run in runs if "fingerprint" in run.data.tags]
    return len(ended) - len(set(ended))


def _git(place: Workspace, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=place.root, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    typer.run(main)
