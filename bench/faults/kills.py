"""SIGKILL at random moments: every stage must still end with the bytes of a run that nothing disturbed, and MLflow know each step once.

python bench/faults/kills.py                    40 kills over sft, reward, ppo and grpo, on one rank and on two: 20 minutes on two cores
python bench/faults/kills.py grpo --kills 15    30 of grpo's, whose prompts are replaced while it goes on
python bench/faults/kills.py sft ppo launch.precision=bf16   with other values

A kill hits a rank, DeepSpeed's launcher or the stage's own launcher, at any time after the first step of a start.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from bench.clone import REPOSITORY, Clone, machine

SMALL = [
    *("base.hidden_size=64", "base.intermediate_size=64", "base.heads=4", "base.kv_heads=2", "base.epochs=0.1"),
    *("data.sources.0.rows=2000", "data.sources.1.rows=600", "data.sources.2.rows=900", "data.sources.3.rows=600"),
    *("sft.epochs=2", "reward.epochs=1", "ppo.steps=20", "ppo.rollout_batch_size=16", "ppo.mini_batch_size=8", "ppo.max_answer_tokens=24"),
    *("grpo.steps=20", "grpo.rollout_batch_size=16", "grpo.mini_batch_size=8", "grpo.max_answer_tokens=24", "grpo.checkpoint_every=2"),
    *("grpo.answers_per_prompt=4", "grpo.ema_decay=0.9", "grpo.kl.where=loss", "grpo.kl.coefficient=0.01", "grpo.reference_every=3"),
    *("sft.checkpoint_every=3", "reward.checkpoint_every=3", "ppo.checkpoint_every=2", "ppo.kl.controller=adaptive", "ppo.ema_decay=0.9"),
]
STAGES = {"ppo": ("sft", "reward", "ppo"), "dapo": ("grpo",)}  # by algorithm; dapo's prompts are replaced while it goes on
VICTIMS = ("rank", "deepspeed", "launcher")
LONGEST_WAIT = 3.0  # seconds after a step was logged


def main(
    words: Annotated[list[str] | None, typer.Argument(metavar="[STAGE | KEY=VALUE]…", help="All stages where none is named.")] = None,
    kills: Annotated[int, typer.Option(help="Kills of each stage on each number of ranks.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the moments and victims.")] = 1,
    output: Annotated[Path, typer.Option(help="Where to write the findings.")] = REPOSITORY / "bench" / "kills.json",
) -> None:
    """Kill each stage again and again, and compare what comes out. Exit code 1: bytes differ, or MLflow lacks or doubles a step."""
    known = {stage: algorithm for algorithm, some in STAGES.items() for stage in some}
    values = [word for word in words or [] if "=" in word]
    wanted = [word for word in words or [] if "=" not in word] or list(known)
    if unknown := set(wanted) - known.keys():
        raise typer.BadParameter(f"no kills of stage {', '.join(sorted(unknown))}: one of {', '.join(known)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    with ExitStack() as afterwards:
        place = Path(tempfile.mkdtemp(prefix="rlhf-kills-"))
        afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        clone = Clone(place)
        use(clone, "ppo", 1, values)
        clone.run("dvc", "repro", "sft", "reward")
        if "ppo" in wanted:
            clone.run("dvc", "repro", "ppo")
        for algorithm, ranks in itertools.product(STAGES, (1, 2)):
            use(clone, algorithm, ranks, values)
            for stage in (stage for stage in wanted if known[stage] == algorithm):
                rows.append(disturb(clone, stage, ranks, kills, chance))
                console.print(f"{stage}, {ranks} rank{'s' * (ranks > 1)}: {'the same bytes' if rows[-1]['same'] else 'OTHER BYTES'}")
    console.print(table(rows))
    output.write_text(json.dumps({"machine": machine(), "values": values, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if not all(row["same"] and row["steps_once"] for row in rows):
        raise typer.Exit(1)


def use(clone: Clone, algorithm: str, ranks: int, values: list[str]) -> None:
    stages = [stage for some in STAGES.values() for stage in some]
    layouts = [f"launch.jobs.{stage}.{key}={value}" for stage in stages for key, value in (("processes", ranks), ("threads", 1))]
    clone.run("rlhf", "use", "sandbox", f"algorithm={algorithm}", *SMALL, *layouts, *values)


def disturb(clone: Clone, stage: str, ranks: int, kills: int, chance: random.Random) -> dict[str, Any]:
    """Run a stage undisturbed, then again with kills; what was found."""
    forget(clone, stage)
    clone.run("rlhf", "launch", stage)
    expected = weights(clone, stage)
    forget(clone, stage)
    victims: Counter[str] = Counter()
    same, goes_on, cut = True, 0, 0
    while True:
        process, last = start(clone, stage), victims.total() == kills
        if not last:
            victim = chance.choice(VICTIMS)
            await_step(clone, stage, process)
            time.sleep(chance.uniform(0, LONGEST_WAIT))
            if kill(process, victim):
                victims[victim] += 1
            await_end(process)
            whole = [f"COMPLETE-{rank}" for rank in range(ranks)]
            found = clone.root.glob(f"runs/{stage}/*/checkpoints/*")
            cut += any(not (path / marker).exists() for path in found for marker in whole)
        said = process.communicate()[0]
        goes_on += "goes on from step" in said
        if process.returncode == 0:  # it came to its end, whether it was left alone or the kill came too late
            same &= weights(clone, stage) == expected
        if last:
            if process.returncode:
                print(said[-2000:], file=sys.stderr)
            break
        if process.returncode == 0:
            forget(clone, stage)
    return {
        "stage": stage,
        "ranks": ranks,
        "kills": victims.total(),
        **{f"{victim} killed": victims[victim] for victim in VICTIMS},
        "went_on": goes_on,
        "cut_checkpoints": cut,
        "same": same and process.returncode == 0,
        "steps_once": steps_once(clone, stage),
    }


def forget(clone: Clone, stage: str) -> None:
    for path in (f"models/{stage}", f"runs/{stage}"):
        shutil.rmtree(clone.root / path, ignore_errors=True)


def start(clone: Clone, stage: str) -> subprocess.Popen[str]:
    words = ["rlhf", "launch", stage]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(words, cwd=clone.root, env=clone.environment, **options)


def await_step(clone: Clone, stage: str, process: subprocess.Popen[str]) -> None:
    """Wait until this start of the stage has logged a step, or has ended."""
    before = logged(clone, stage)
    while logged(clone, stage) == before and process.poll() is None:
        time.sleep(0.05)


def logged(clone: Clone, stage: str) -> int:
    return sum(len(path.read_bytes()) for path in clone.root.glob(f"runs/{stage}/*/metrics.jsonl"))


def kill(process: subprocess.Popen[str], victim: str) -> bool:
    """Kill one process of a stage; False where it had ended before."""
    if process.poll() is not None:
        return False
    found = [process.pid] if victim == "launcher" else of(process.pid, victim)
    if not found:
        return False
    psutil.Process(found[-1]).send_signal(signal.SIGKILL)
    return True


def of(pid: int, victim: str) -> list[int]:
    """The ids of a stage's ranks, or of DeepSpeed's launcher."""
    word = {"rank": "rlhf.stages.", "deepspeed": "deepspeed.launcher.launch"}[victim]
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            words = child.cmdline()
        except psutil.Error:
            continue  # it has just ended
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        if module.startswith(word):
            found.append(child.pid)
    return found


def await_end(process: subprocess.Popen[str]) -> None:
    """Wait until nothing of the stage is left: its guard stops the others."""
    process.wait()
    while any(_session(other.pid) == process.pid for other in psutil.process_iter()):
        time.sleep(0.1)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def weights(clone: Clone, stage: str) -> str:
    return hashlib.sha256((clone.root / "models" / stage / "model.safetensors").read_bytes()).hexdigest()


def steps_once(clone: Clone, stage: str) -> bool:
    """Whether MLflow's latest run of the stage has each step of each metric exactly once."""
    client = MlflowClient(f"sqlite:///{clone.root}/mlruns/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    run = client.search_runs(experiments, f"tags.stage = '{stage}'", order_by=["attributes.start_time DESC"], max_results=1)[0]
    total = json.loads(next(clone.root.glob(f"runs/{stage}/*/metrics.jsonl")).read_text(encoding="utf-8").splitlines()[-1])["total"]
    name = "curves/reward" if stage in ("ppo", "grpo") else "curves/loss"
    return [point.step for point in client.get_metric_history(run.info.run_id, name)] == list(range(1, total + 1))


def table(rows: list[dict[str, Any]]) -> Table:
    drawn = Table(title="killed and gone on with", title_justify="left")
    for name in rows[0]:
        drawn.add_column(name.replace("_", " ").replace(" ", "\n", 1))
    for row in rows:
        drawn.add_row(*(("yes" if value else "NO") if isinstance(value, bool) else str(value) for value in row.values()))
    return drawn


if __name__ == "__main__":
    typer.run(main)
