"""Where the time of a training step goes: the stages' own code on random models of some 12 million weights, profiled by torch.

python bench/speed/steps.py                              sft, reward, dpo and ppo, of Llama and OPT: five minutes on one core
python bench/speed/steps.py --only llama/ppo             one of them
python bench/speed/steps.py --precision bf16 --operations 30 --only llama-135m/sft
python bench/speed/steps.py --pairs pairs.jsonl.gz       texts of a file of Anthropic-style pairs instead of the sandbox's

Prompts of up to 128 tokens. llama-135m has the shape of SmolLM2. A stage runs some steps: the first is left out, the last
is profiled, the others are timed. Kinds of work are those of torch's operations, by the processor's time in each without what it calls.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench.speed.report import console
from bench.speed.sides import free_port, place_of
from bench.speed.workload import NEVER, SMALL, Workspace, jobs, workspace
from rlhf import config
from rlhf.job import Job
from rlhf.launcher.command import OPENMP
from rlhf.models.dialogues import encode_dialogues

STEPS, ROWS = 4, 16  # ROWS: of a batch; half as many pairs; twice as many answers of ppo
STAGES = ("sft", "reward", "dpo", "ppo")
# what the names of torch's operations have in them → what they are; the first that fits
KINDS = {
    "mm": "matrix products",
    "linear": "matrix products",
    "flash_attention": "attention",
    "copy": "copies",
    "cat": "copies",
    "index": "copies",
    "gather": "copies",
    "scatter": "copies",
    "fill": "copies",
    "zero": "copies",
    "adam": "optimiser",
    "foreach": "optimiser",
    "norm": "optimiser",
}
HEADINGS = (*dict.fromkeys(KINDS.values()), "arithmetic", "outside torch")


def main(
    only: Annotated[list[str] | None, typer.Option(help="MODEL/STAGE, several times.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with `chosen` and `rejected`; may end in .gz.")] = None,
    answers: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 64,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    micro: Annotated[int, typer.Option(help="Tokens of a micro-batch.")] = 4096,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    operations: Annotated[int, typer.Option(help="Print so many of torch's operations, those that took longest.")] = 0,
) -> None:
    """Print seconds and tokens per second of a step, and the milliseconds of processor time of each kind of work."""
    shown = Table(
        title=f"A step: seconds, tokens per second, milliseconds by kind of work; answers of up to {answers}", title_justify="left"
    )
    for heading in ("model/stage", "tokens", "seconds", "tokens/s", *HEADINGS):
        shown.add_column(heading, justify="left" if heading == "model/stage" else "right")
    os.environ |= {**OPENMP, "DS_ACCELERATOR": "cpu"}
    context = multiprocessing.get_context("spawn")
    for name in only or [f"{family}/{stage}" for family in SMALL for stage in STAGES]:
        family, stage = name.split("/")
        with workspace(family, pairs, STEPS * 2 * ROWS, answers, params(answers, micro), precision=precision) as place:
            tokens = tokens_of_a_step(place, stage, answers)
            result = context.Queue()
            process = context.Process(target=measure, args=(place.root, stage, threads, operations, result))
            process.start()
            process.join()
            if process.exitcode:
                raise typer.Exit(1)
            found = result.get()
        cells = [f"{1000 * found['kinds'].get(heading, 0.0):.0f}" for heading in HEADINGS]
        shown.add_row(name, f"{tokens:.0f}", f"{found['seconds']:.2f}", f"{tokens / found['seconds']:.0f}", *cells)
        print(name, json.dumps(found["logged"]), *found["operations"], sep="\n", flush=True)
    console().print(shown)


def params(answers: int, micro: int) -> dict[str, dict[str, Any]]:
    """What differs from the sandbox's: a few steps of each stage, no mixture text."""
    rows = STEPS * 2 * ROWS
    batches = {"sft": ROWS, "reward": ROWS // 2, "dpo": ROWS // 2}
    steps = {
        "steps": STEPS,
        "rollout_batch_size": 2 * ROWS,
        "mini_batch_size": ROWS,
        "max_answer_tokens": answers,
        "mixture_coefficient": 0.0,
    }
    return {
        **{
            name: {"batch_size": size, "epochs": STEPS * size / rows, "max_tokens": 512, "checkpoint_every": NEVER}
            for name, size in batches.items()
        },
        "ppo": {**steps, "critic_warmup_steps": 0, "max_approx_kl": NEVER, "checkpoint_every": NEVER},
        "launch": {"jobs": jobs(tokens=micro)},
    }


def tokens_of_a_step(place: Workspace, stage: str, answers: int) -> float:
    """Tokens of prompts and answers of a step on average, each pair's prompt twice; of ppo, as if each answer came to the limit."""
    chosen, rejected = (
        encode_dialogues(place.tokenizer, [pair.dialogue(getattr(pair, side)) for pair in place.pairs]) for side in ("chosen", "rejected")
    )
    asked = statistics.fmean(mask.index(1) for _, mask in chosen)
    first, second = (statistics.fmean(len(ids) for ids, _ in side) for side in (chosen, rejected))
    return {"sft": ROWS * first, "ppo": 2 * ROWS * (asked + answers)}.get(stage, ROWS // 2 * (first + second))


@dataclass(frozen=True)
class WatchedJob(Job):
    """A job whose steps are timed as they are logged, the last one under the profiler."""

    times: list[float] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)
    profiler: Any = field(default_factory=lambda: profile(activities=[ProfilerActivity.CPU]))

    def log(self, step: int, total: int, metrics: Any) -> None:
        self.times.append(time.perf_counter())
        if step < total:
            self.logged.update(metrics)
        if step == total - 1:
            self.profiler.start()
        if step == total:
            self.profiler.stop()


def measure(root: Path, stage: str, threads: int, operations: int, result: Any) -> None:
    """In a process of its own: run the stage and tell what its steps took."""
    os.environ |= place_of(0, 1, free_port())
    os.dup2(os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT), 1)
    torch.set_num_threads(threads)
    job = WatchedJob(stage, config.load(root / "params.yaml"), root, root / "runs", "cpu", 0, 1, 0)
    job.folder.mkdir()
    import_module(f"rlhf.stages.{stage}").main(job)
    seconds = statistics.median(after - before for before, after in zip(job.times, job.times[1:-1], strict=False))
    kinds = dict.fromkeys(HEADINGS, 0.0)
    for event in job.profiler.key_averages():
        if event.key.startswith(("aten::", "mkldnn::")):
            kind = next((kind for part, kind in KINDS.items() if part in event.key), "arithmetic")
            kinds[kind] += event.self_cpu_time_total / 1e6
    kinds["outside torch"] = max(0.0, job.times[-1] - job.times[-2] - sum(kinds.values()))
    longest = sorted(job.profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:operations]
    told = [f"{event.self_cpu_time_total / 1000:10.1f} ms  {event.count:6}  {event.key}" for event in longest]
    result.put({"seconds": seconds, "kinds": kinds, "logged": job.logged, "operations": told})


if __name__ == "__main__":
    typer.run(main)
