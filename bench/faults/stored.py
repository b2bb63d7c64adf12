"""SIGKILL at random moments of a whole `dvc repro`: every file must end as in a run that nothing disturbed, no stage be trained twice.

python bench/faults/stored.py                          ten kills each of three rounds, a warm start with grpo, ppo with a bandit
python bench/faults/stored.py rounds rrhf --kills 3    of some only

A kill hits a rank, DeepSpeed's launcher, the stage's own, DVC, or everything at once, as a power cut does. What is hit is started again.
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from bench.clone import REPOSITORY, machine
from bench.faults.kills import table
from bench.faults.sweeps import ended_twice
from bench.faults.workspace import PATIENCE, SMALL, Workspace

OWN = shlex.split("""
answers.prompts=40 answers.heldout_prompts=20 answers.answers_per_temperature=2 answers.max_answer_tokens=16 answers.batch_size=16
iterative.dpo.checkpoint_every=2 best_of_n.checkpoint_every=1 rrhf.checkpoint_every=1 awac.checkpoint_every=2
grpo.steps=20 grpo.rollout_batch_size=16 grpo.mini_batch_size=8 grpo.max_answer_tokens=16 grpo.answers_per_prompt=4 grpo.checkpoint_every=4
""")
BANDIT = "{clusters: {learning_rate_factor: [1.0, 0.25, 4.0], kl_coefficient: [0.1, 0.4]}, kl_weight: 0.0, window: 10, exploration: 3.0}"
WAYS = {
    "rounds": ("algorithm=iterative", "iterative.rounds=3"),
    "warm": ("algorithm=grpo", "awac.versions=1", "seed=2"),  # after a version of another seed
    "ultho": ("algorithm=ppo", f"ppo.ultho={BANDIT}"),
    "best-of-n": ("algorithm=best-of-n",),
    "rrhf": ("algorithm=rrhf",),
}
BY_ITSELF = ("rounds", "warm", "ultho")
VICTIMS = ("rank", "deepspeed", "launcher", "dvc", "everything")
LONGEST_WAIT = 15.0  # seconds before a kill


def main(
    ways: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(WAYS)}; {', '.join(BY_ITSELF)} where none is named.")] = None,
    kills: Annotated[int, typer.Option(help="Kills of each.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments and victims.")] = 1,
    output: Annotated[Path, typer.Option(help="Where to write the findings.")] = REPOSITORY / "bench" / "stored.json",
) -> None:
    """Kill each run again and again. Exit code 1: other bytes, a stage trained twice, or something done by a run that is over."""
    names = ways or list(BY_ITSELF)
    if unknown := set(names) - WAYS.keys():
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; one of {', '.join(WAYS)}")
    console, chance, rows = Console(width=None if sys.stdout.isatty() else 120), random.Random(seed), []
    folder = Path(tempfile.mkdtemp(prefix="rlhf-stored-"))
    try:
        before = Workspace(folder / "before")
        before.run("rlhf", "use", "sandbox", *SMALL, *OWN, "algorithm=grpo")
        before.run("rlhf", "run")  # a first version, whose answers a warm start learns from
        for name in names:
            rows.append({"run": name, **disturb(before, folder / name, WAYS[name], kills, chance)})
            console.print(f"{name}: {'the same bytes' if rows[-1]['same'] else 'OTHER BYTES'}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console.print(table(rows))
    output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if not all(row["same"] and not row["trained_twice"] and row["again_nothing"] for row in rows):
        raise typer.Exit(1)


def disturb(before: Workspace, folder: Path, way: tuple[str, ...], kills: int, chance: random.Random) -> dict[str, Any]:
    """One run that nothing disturbs, and one with so many kills, anew where it ends before they are made; what was found."""
    calm = copied(before, folder / "calm", way)
    calm.run("dvc", "repro")
    expected = found(calm)
    place = copied(before, folder / "killed-1", way)
    victims: Counter[str] = Counter()
    same, twice, runs, began = True, 0, 1, time.monotonic()
    while True:
        process = place.start("dvc", "repro")
        hit = victims.total() >= kills  # no more of them
        while process.poll() is None and not hit:
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.5, LONGEST_WAIT))
            if process.poll() is None and (killed := kill(place, process, chance.choice(VICTIMS))):
                victims, hit = victims + killed, True
        process.wait(PATIENCE)
        place.gone()
        if process.returncode:
            continue
        same, twice = same and found(place) == expected, twice + ended_twice(place, lambda tags: tags["fingerprint"])
        if victims.total() >= kills:
            break
        runs += 1
        place = copied(before, folder / f"killed-{runs}", way)
    again = subprocess.run(["dvc", "repro"], cwd=place.root, env=place.environment, capture_output=True, text=True, check=False)
    nothing = again.returncode == 0 and "Running stage" not in again.stdout
    counts = {f"{victim} killed": victims[victim] for victim in VICTIMS}
    return {
        **counts,
        "runs": runs,
        "same": same,
        "trained_twice": twice,
        "again_nothing": nothing,
        "seconds": round(time.monotonic() - began),
    }


def copied(before: Workspace, folder: Path, way: tuple[str, ...]) -> Workspace:
    """The workspace once more, with its own values and its registry, and no version but the first one."""
    folder.mkdir(parents=True)
    subprocess.run(["cp", "-a", str(before.root), str(folder / "clone")], check=True)
    place = Workspace(folder)
    place.run("rlhf", "use", "sandbox", *SMALL, *OWN, *way)
    return place


def kill(place: Workspace, process: subprocess.Popen[bytes], victim: str) -> Counter[str]:
    """Kill one process of a run, or all of them; none where it is not there just now."""
    if victim == "everything":
        place.kill_all()
        return Counter([victim])
    for one in place.find(victim)[-1:]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
            return Counter([victim])
    return Counter()


def found(place: Workspace) -> dict[str, str]:
    """What dvc.lock says, whatever the order of its stages, and the bytes of what they made."""
    lock = "".join(sorted((place.root / "dvc.lock").read_text(encoding="utf-8").splitlines()))
    files = [path for name in ("models", "metrics", "plots", "data") for path in sorted((place.root / name).rglob("*")) if path.is_file()]
    return {"dvc.lock": lock} | {str(path.relative_to(place.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    typer.run(main)
