"""Both presets of SmolLM2, several seeds side by side on one GPU (or processor), without the servers of Prefect, DVC and MLflow.

python bench/real_model/seeds.py MODEL hh.jsonl.gz --output DIR                   seeds 1 to 3 of both presets
python bench/real_model/seeds.py MODEL hh.jsonl.gz --output DIR --peers --again   then TRL's trainers, and seed 1 once more
python bench/real_model/seeds.py MODEL hh.jsonl.gz --output DIR --accelerator cpu --seed 1 grpo.steps=2   with changed values

MODEL is the folder that bench/real_model/folder.py makes. Each stage is a process as the launcher starts it (docs/architecture.md,
"Between launcher and stage"), without the launcher's own, and without checkpoints. What a seed has in common is trained once:
smollm2-135m-hh's sft and reward model are followed by ppo, grpo and dpo. After each stage a line is added to DIR/stages.jsonl (what it cost
and what it measured), and its small files to DIR/files.zip, so that a run which is cut off leaves what it had. A stage that fails takes
those along that need it; the end of its log is printed. `bench/real_model/results.py DIR` makes tables of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from transformers import AutoConfig

from bench.clone import REPOSITORY
from bench.real_model import tasks
from bench.real_model.side_by_side import End, Start, Task, on_gpu, on_processor, run_all
from bench.real_model.sizes import shape
from bench.speed.sides import free_port, place_of
from rlhf import config
from rlhf.launcher import command
from rlhf.plan.memory import Shape, need
from rlhf.workspace import presets

ROOM = 0.9  # of the device's memory
PEER_GIB = 14.0
LINES_SHOWN = 15
LARGE = ("models", "prepared", "rollouts.jsonl")  # outputs that stay where they are
COMMON = ("prepare", "base", "sft", "reward")
BRANCHES = {"smollm2-135m-hh": ("ppo", "grpo", "dpo"), "smollm2-135m-checkable": ("grpo",)}
ORDER = ("evaluate", "prepare", "base", "sft", "reward", "grpo", "ppo", "dpo", "peers")  # which of two that may begin goes first


@dataclass(frozen=True)
class Stage:
    """A stage to run in a workspace of its own or its seed's.

    Args:
        name: PRESET-SEED, with the algorithm where there are several; then what it is.
        before: the workspace whose data and models it begins with.
        module: what is run; TRL's trainers stand in for stages.
    """

    name: str
    stage: str
    root: Path
    preset: str
    seed: int
    values: tuple[str, ...]
    after: tuple[str, ...]
    before: Path | None = None
    module: str = ""
    late: int = 0  # as Task has it

    @property
    def folder(self) -> Path:
        return self.root / "runs" / self.stage


def main(
    model: Annotated[Path, typer.Argument(help="The folder of SmolLM2-135M-Instruct.")],
    pairs: Annotated[Path, typer.Argument(help="Pairs in the hh form: JSON lines, may end in .gz.")],
    values: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changed values, of both presets.")] = None,
    output: Annotated[Path, typer.Option(help="Where to write what came out.")] = Path("real-model"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="1, 2 and 3 where none is named.")] = None,
    only: Annotated[str, typer.Option(help="A part of the name of the preset wanted.")] = "",
    together: Annotated[int, typer.Option(help="Stages at a time.")] = 8,
    gib: Annotated[float | None, typer.Option(help=f"What they may hold together, by rlhf/plan/memory.py; left out: {ROOM:.0%}.")] = None,
    seconds: Annotated[float, typer.Option(help="What has not ended by then is cut off.")] = 3600,
    accelerator: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    peers: Annotated[bool, typer.Option("--peers", help="TRL's trainers as well.")] = False,
    peer_steps: Annotated[int, typer.Option(help="Steps of TRL's grpo, and of ours beside it; 0: as the preset has them.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="The first seed once more, for the bytes.")] = False,
    variant: Annotated[list[str] | None, typer.Option(help='Another branch: "hh grpo NAME KEY=VALUE …", or of checkable.')] = None,
) -> None:
    """Run the stages, and print a line of each."""
    began = time.monotonic()
    device = "cuda" if command.find_gpus(accelerator) else "cpu"
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as afterwards:
        place = Path(tempfile.mkdtemp(prefix="rlhf-seeds-"))
        afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        tasks.main(pairs, place / "tasks", 1)
        own = (*common_values(model, accelerator), *(values or []))
        chosen = Chosen(peers, peer_steps, again, tuple(variant or ()))
        plan = planned(place, seeds or [1, 2, 3], only, own, chosen)
        given = {"tasks": place / "tasks", "pairs": pairs}
        size = shape(AutoConfig.from_pretrained(model))
        by_name = {stage.name: stage for stage in plan}
        todo = [Task(one.name, partial(start, one, given, device), one.after, room_of(one, size), one.late) for one in plan]
        print(f"{len(todo)} stages on {device}, ready after {time.monotonic() - began:.0f} s", flush=True)
        run_all(
            todo,
            together,
            gib or ROOM * memory_of(device),
            seconds - (time.monotonic() - began),
            lambda task, end: keep(by_name[task.name], end, output),
            on_gpu if device == "cuda" else on_processor,
        )


def memory_of(device: str) -> float:
    """GiB of the machine, or of its first GPU."""
    if device == "cpu":
        return psutil.virtual_memory().total / 2**30
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total) / 2**30


# ------------------------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True)
class Chosen:
    """What is run besides the presets."""

    peers: bool = False
    peer_steps: int = 0
    again: bool = False
    variants: tuple[str, ...] = ()


def common_values(model: Path, accelerator: str) -> tuple[str, ...]:
    """What differs from the presets: where the model lies, the device, and no checkpoints."""
    never = (f"{section}.checkpoint_every=1000000" for section in ("sft", "reward", "ppo", "grpo", "dpo", "evaluate.judge"))
    slots = () if accelerator == "cpu" else ("launch.rollout.slots=256",)
    return (f"base.model={model.resolve()}", "base.revision=null", f"launch.accelerator={accelerator}", *slots, *never)


def planned(place: Path, seeds: Sequence[int], only: str, values: tuple[str, ...], chosen: Chosen) -> list[Stage]:
    """All stages, in the order in which they are to begin where they may."""
    found: list[Stage] = []
    for preset in (name for name in BRANCHES if only in name):
        for seed in seeds:
            found += of_seed(place, preset, seed, values, "", chosen)
        if chosen.again:
            found += of_seed(place, preset, seeds[0], values, "-again", Chosen())
    numbers = {stage.name: (stage.late, ORDER.index(stage.stage), stage.seed) for stage in found}
    return sorted(found, key=lambda stage: numbers[stage.name])


def of_seed(place: Path, preset: str, seed: int, values: tuple[str, ...], suffix: str, chosen: Chosen) -> list[Stage]:
    """The stages of a seed: those in common, and those of each algorithm."""
    short = f"{preset.rpartition('-')[2]}-{seed}{suffix}"
    late, branches = (3, BRANCHES[preset][:1]) if suffix else (0, BRANCHES[preset])
    raw = "data.sources.0.path=data/raw/hh.jsonl.gz" if preset.endswith("hh") else f"algorithm={branches[0]}"
    own = (f"seed={seed}", raw, *values)
    common = [name for name in COMMON if name != "reward" or preset.endswith("hh")]
    needs = {"prepare": (), "base": ("prepare",), "sft": ("base",), "reward": ("base",)}
    found = [
        Stage(f"{short} {name}", name, place / short, preset, seed, own, tuple(f"{short} {one}" for one in needs[name]), late=late)
        for name in common
    ]
    whole = tuple(f"{short} {name}" for name in common)

    def branch(name: str, stage: str, module: str = "", later: int = 0, changed: Sequence[str] = ()) -> list[Stage]:
        label, given = f"{short}-{name}", (preset, seed, (*own, f"algorithm={stage}", *changed))
        return [
            Stage(f"{label} {stage}", stage, place / label, *given, whole, place / short, module, late + later),
            Stage(f"{label} evaluate", "evaluate", place / label, *given, (f"{label} {stage}",), late=late),
        ]

    for name in branches:
        found += branch(name, name)
    if chosen.peers and preset.endswith("hh"):
        root, needed = place / f"{short}-dpo", (f"{short}-dpo dpo",)
        found.append(Stage(f"{short} peers", "peers", root, preset, seed, own, needed, module="bench.real_model.peers", late=1))
    elif chosen.peers:
        steps = (f"grpo.steps={chosen.peer_steps}",) if chosen.peer_steps else ()
        found += branch("trl", "grpo", "bench.real_model.peer_grpo", later=1, changed=steps)
        found += branch("grpo_short", "grpo", later=1, changed=steps) if steps else []
    for kind, stage, name, *changed in map(str.split, chosen.variants):
        if preset.endswith(kind):
            found += branch(f"{stage}_{name}", stage, later=2, changed=changed)
    return found


def room_of(stage: Stage, size: Shape) -> float:
    """GiB that a stage holds, by the account of rlhf/plan/memory.py."""
    if stage.stage == "prepare":
        return 0.0
    if stage.module:
        return PEER_GIB
    text = (REPOSITORY / "presets" / f"{stage.preset}.yaml").read_text(encoding="utf-8")
    params = presets.with_values(text, stage.values, stage.preset)[1]
    return need(stage.stage, params, size).total / 2**30


# ----------------------------------------------------------------------------------------------------------------- begin


def start(one: Stage, given: dict[str, Path], device: str) -> Start:
    """Make the stage's folder ready."""
    make(one, given)
    params = config.load(one.root / "params.yaml")
    shutil.rmtree(one.folder, ignore_errors=True)
    one.folder.mkdir(parents=True)
    kind = "dpo" if one.stage == "peers" else one.stage
    environment = command.environment(kind, params, one.root, one.folder, device)
    path = os.pathsep.join([environment["PYTHONPATH"], str(REPOSITORY)])
    words = [sys.executable, "-u", "-m", one.module or f"rlhf.stages.{one.stage}"]
    if one.stage == "peers":
        words += [str(one.root), "--output", str(one.folder / "out/metrics/peers.json")]
    place = {} if one.module else place_of(0, 1, free_port())
    return Start(words, one.root, environment | place | {"PYTHONPATH": path}, one.folder / "log.txt")


def make(one: Stage, given: dict[str, Path]) -> None:
    """Write params.yaml, and bring the data or what the seed's other workspace has."""
    if (one.root / "params.yaml").exists():
        return
    if one.before:
        for name in ("data/prepared", "models"):
            shutil.copytree(one.before / name, one.root / name, copy_function=os.link)
    else:
        shutil.copytree(given["tasks"], one.root / "data/raw/tasks")
        shutil.copyfile(given["pairs"], one.root / "data/raw/hh.jsonl.gz")
    text = (REPOSITORY / "presets" / f"{one.preset}.yaml").read_text(encoding="utf-8")
    (one.root / "params.yaml").write_text(presets.with_values(text, one.values, one.preset)[0], encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------- end


def keep(one: Stage, end: End, output: Path) -> None:
    """Publish what a stage wrote, as the launcher does, and note what came of it."""
    out = one.folder / "out"
    row: dict[str, Any] = {"name": one.name, "preset": one.preset, "seed": one.seed, "stage": one.stage, "values": one.values}
    row |= {"how": end.how, "began": round(end.began, 1), "seconds": round(end.seconds, 1), "gib": round(end.gib, 2), "why": end.why}
    if end.how == 0:
        row["weights"] = {path.parent.name: digest(path) for path in sorted(out.glob("models/*/model.safetensors"))}
        row["metrics"] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("metrics/*.json"))}
        shutil.copytree(out, one.root, copy_function=os.link, dirs_exist_ok=True)
    row |= steps_of(one.folder / "metrics.jsonl")
    with (output / "stages.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    with zipfile.ZipFile(output / "files.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        small = [
            path for path in sorted(out.rglob("*")) if path.is_file() and not any(part in LARGE for part in path.relative_to(out).parts)
        ]
        for path in (*small, *(one.folder / name for name in ("log.txt", "metrics.jsonl"))):
            if path.exists():
                archive.write(path, f"{one.name}/{path.name}")
    print(f"[{end.began + end.seconds:4.0f} s] {one.name}: {told(end, row)}", flush=True)
    if end.how != 0 and (log := one.folder / "log.txt").exists():
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]), flush=True)


def told(end: End, row: dict[str, Any]) -> str:
    how = "ended" if end.how == 0 else f"{end.how} {end.why}".strip() if isinstance(end.how, str) else f"failed with exit code {end.how}"
    cost = row.get("cost", {}).get("seconds")
    return f"{how} after {end.seconds:.0f} s, {end.gib:.1f} GiB" + (f", {row['steps']} steps of {cost:.2f} s" if cost else "")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def steps_of(path: Path) -> dict[str, Any]:
    """How many steps a stage logged, the last one's numbers, and the median of what a step cost; nothing where it logs none."""
    lines = [json.loads(line)["metrics"] for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if not lines:
        return {}
    costs = [name for name in lines[-1] if name.endswith(("seconds", "per_second", "utilisation", "memory_gib"))]
    medians = {name: statistics.median(line[name] for line in lines if name in line) for name in costs}
    return {"steps": len(lines), "last": lines[-1], "cost": medians}


if __name__ == "__main__":
    typer.run(main)
