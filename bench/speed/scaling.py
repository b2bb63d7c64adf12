"""How time and memory of a PPO step grow: twice the rollouts, twice the answers' length, four times the model, two ranks.

python bench/speed/scaling.py                         all of them: some minutes on two cores
python bench/speed/scaling.py --pairs pairs.jsonl.gz  prompts of a file of Anthropic-style pairs instead of the sandbox's

Each variant and the base case make their steps in turn, as the two sides of a benchmark do, on the same prompts. Micro-batches, slots and
mini-batches stay as they are, so that twice the rollouts are twice the updates. The base case answers half of the prompts in a step and
the other half in the next, so rounds come in twos, and what they took is added up. Ranks are processes of one thread each.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bench.speed.ppo_step import Plan, planned_stage
from bench.speed.report import console
from bench.speed.sides import Side, Step
from bench.speed.workload import CONTEXT, workspace

FAMILY = "llama"
PROMPTS = 32  # of which a step answers some or all
ROUNDS = 4
MICRO_BATCH = 512  # tokens: fewer than a mini-batch has, so that it is the limit in each case


@dataclass(frozen=True)
class Variant:
    plan: Plan
    ranks: int = 1
    sizes: dict[str, Any] = field(default_factory=dict)  # of the model


BASE = Variant(Plan(16, 32))
LARGER = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2304}
VARIANTS = {
    "rollouts × 2": replace(BASE, plan=Plan(32, 32, updates=4)),
    "answers × 2": replace(BASE, plan=Plan(16, 64)),
    "model × 4": replace(BASE, sizes=LARGER),
    "ranks × 2": replace(BASE, ranks=2),
}
Row = dict[str, Any]


def main(
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with `chosen` and `rejected` dialogues; may end in .gz.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds, an even number.")] = ROUNDS,
) -> None:
    """Print seconds and peak memory of each variant, and their ratios to the base case's."""
    console().print(drawn(rows(pairs, rounds)))


def rows(pairs: Path | None, rounds: int) -> list[Row]:
    """The base case and the variants: what a step takes, and its ratio to the base case's; processor time and memory are rank 0's."""
    found: list[Row] = []
    for name, variant in VARIANTS.items():
        with ExitStack() as afterwards:
            places = [afterwards.enter_context(_workspace(pairs, one, rounds)) for one in (BASE, variant)]
            sides = [
                afterwards.enter_context(Side(planned_stage, place.root, one.plan, ranks=one.ranks))
                for place, one in zip(places, (BASE, variant), strict=True)
            ]
            steps = [(sides[0].step(), sides[1].step()) for _ in range(rounds + 1)][1:]  # the first is to get ready
        if not found:
            found.append(_row("base", BASE, places[0].parameters, [(one, one) for one, _ in steps]))
        found.append(_row(name, variant, places[1].parameters, steps))
    return found


def _workspace(pairs: Path | None, variant: Variant, rounds: int) -> Any:
    params = variant.plan.params(rounds, ranks=variant.ranks, tokens=MICRO_BATCH)
    params["launch"] |= {"rollout": {"slots": BASE.plan.answers // variant.ranks, "gather": "whole"}}
    return workspace(FAMILY, pairs, PROMPTS, CONTEXT, params, **variant.sizes)


def _row(name: str, variant: Variant, parameters: int, steps: list[tuple[Step, Step]]) -> Row:
    """Of rounds of (base, variant)."""
    base, own = ({key: sum(getattr(step, key) for step in side) for key in ("seconds", "processor")} for side in zip(*steps, strict=True))
    memory = [max(step.memory for step in side) for side in zip(*steps, strict=True)]
    plan = variant.plan
    return {
        "name": name,
        "seconds": own["seconds"] / len(steps),
        "memory_gib": memory[1] / 2**30,
        "seconds_ratio": own["seconds"] / base["seconds"],
        "processor_ratio": own["processor"] / base["processor"],
        "memory_ratio": memory[1] / memory[0],
        "setting": f"{parameters / 1e6:.1f} million weights, {plan.answers} answers of up to {plan.limit}, ranks: {variant.ranks}",
    }


def drawn(found: list[Row]) -> Table:
    shown = Table(title="A PPO step, in turn with the base case", title_justify="left")
    for heading in ("", "seconds", "× base", "× base, processor time of rank 0", "GiB of rank 0", "× base", "setting"):
        shown.add_column(heading, justify="left" if heading in {"", "setting"} else "right")
    for row in found:
        numbers = (f"{row[key]:.2f}" for key in ("seconds", "seconds_ratio", "processor_ratio", "memory_gib", "memory_ratio"))
        shown.add_row(row["name"], *numbers, row["setting"])
    return shown


if __name__ == "__main__":
    typer.run(main)
