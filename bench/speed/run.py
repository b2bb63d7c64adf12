"""`make bench`: every speed case, in turn with its peer, and how a PPO step grows. Printed, and written to bench/results.json.

python bench/speed/run.py                         everything: half an hour on quiet cores
python bench/speed/run.py --quick                 for a look: short answers, few rounds
python bench/speed/run.py --pairs pairs.jsonl.gz  texts of a file of Anthropic-style pairs instead of the sandbox's
python bench/speed/run.py --page bench/speed/RESULTS.md the tables as a page, too
python bench/speed/run.py --only 135m             cases with that in their names; a section of its own on the page
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from bench.speed import generation, ppo_step, scaling, training
from bench.speed.report import collect, console, markdown, table, write, write_section

RESULTS = Path(__file__).with_name("results.json")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Answers of up to 64 tokens only, few rounds.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with `chosen` and `rejected` dialogues; may end in .gz.")] = None,
    only: Annotated[str, typer.Option(help="A part of the names of the cases wanted; `scaling`: how a PPO step grows.")] = "",
    rounds: Annotated[int | None, typer.Option(help="Rounds of each case; the median of their ratios counts.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of either side.")] = 2,
    chat: Annotated[
        Path | None, typer.Option(help="The folder applications/DeepSpeed-Chat of a checkout: the PPO step against it, too.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = RESULTS,
    page: Annotated[Path | None, typer.Option(help="Where to write the tables as a page.")] = None,
) -> None:
    """Print ours, the peer's and the median of the rounds' ratios for every case."""
    few = rounds or (1 if quick else 3)
    found = collect(
        itertools.chain(
            generation.cases(pairs, few, threads, only, quick=quick),
            training.cases(pairs, few, threads, only),
            ppo_step.cases(pairs, rounds or (1 if quick else ppo_step.ROUNDS), threads, only, quick=quick, chat=chat),
        )
    )
    growth = scaling.rows(pairs, 2 if quick else scaling.ROUNDS) if only in "scaling" else []
    console().print(*([table(found)] if found else []), *([scaling.drawn(growth)] if growth else []))
    written = write(output, found, only=only, scaling=growth, texts=pairs.name if pairs else "the sandbox's")
    if page:
        write_section(page, f"Speed: {only}" if only else "Speed", markdown(written))


if __name__ == "__main__":
    typer.run(main)
