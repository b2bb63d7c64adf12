"""A step of stage grpo, in samples per second and bytes, beside one of stage ppo: same weights, reward model, prompts, number of answers.

python bench/speed/group_step.py                  answers of up to 64 tokens, eight to each of eight prompts
python bench/speed/group_step.py --limit 256      longer ones

Each is a process of its own (sides.py) with two updates a step; they make their steps in turn, on all prompts: ppo finds each eight times
in its data. How long each answer gets is laid down
beforehand. grpo has a reference whose KL counts in the loss; ppo has it in the reward, and a critic.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer

from bench.speed.ppo_step import ROUNDS, Plan, described, obey
from bench.speed.report import case, console, table, write
from bench.speed.sides import Pause, Side, paced_job
from bench.speed.workload import CONTEXT, workspace
from rlhf.stages import grpo, ppo

ANSWERS, EACH = 64, 8
STAGES = {"grpo": grpo.main, "ppo": ppo.main}
NOT_OF_GRPO = ("critic", "critic_warmup_steps")


def main(
    family: Annotated[str, typer.Option(help="opt or llama, of some 12 million weights.")] = "llama",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    limit: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 64,
    kind: Annotated[str, typer.Option(help="Lengths of the answers: full or varied.")] = "varied",
    rounds: Annotated[int, typer.Option(help="Rounds; the median of their ratios counts.")] = ROUNDS,
    threads: Annotated[int, typer.Option(help="Threads of either side.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Print samples per second of both, the median of the rounds' ratios, and the most memory that each held."""
    plan = Plan(ANSWERS, limit, kind, EACH, precision=precision)
    params = plan.params(rounds)
    params["grpo"] = {name: value for name, value in params["ppo"].items() if name not in NOT_OF_GRPO} | {"answers_per_prompt": EACH}
    with (
        workspace(family, None, ANSWERS // EACH, CONTEXT, params, precision=precision) as place,
        workspace(family, None, ANSWERS // EACH, CONTEXT, params, times=EACH, precision=precision) as often,
        Side(planned, place.root, plan, "grpo", threads=threads, ranks=1) as ours,
        Side(planned, often.root, plan, "ppo", threads=threads, ranks=1) as other,
    ):
        costs = [(ours.step(), other.step()) for _ in range(rounds + 1)][1:]  # the first is to get ready
        name = f"grpo step, {family}, {precision}, up to {limit}, {kind}, against stage ppo"
        found = [case(name, [ANSWERS] * rounds, costs, "samples/s", described(place, plan, threads))]
    console().print(table(found))
    for stage, steps in zip(STAGES, zip(*costs, strict=True), strict=True):
        print(f"{stage}: {statistics.median(step.memory for step in steps) / 2**30:.2f} GiB at most")
    if output:
        write(output, found)


def planned(pause: Pause, root: Path, plan: Plan, stage: str) -> None:
    """A stage as it is, its answers ended where they are planned to."""
    job = paced_job(pause, root, stage)
    obey(plan, job)
    STAGES[stage](job)


if __name__ == "__main__":
    typer.run(main)
