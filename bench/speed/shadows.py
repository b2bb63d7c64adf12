"""What shadow answers cost a user: the assistant's server with and without them, in turn, under clients that pause between questions.

python bench/speed/shadows.py --model models/ppo      a trained model; its candidate is the same one with its weights in another order

Each server holds a champion and a candidate and records every answer; the one with shadows has `traffic.shadow` 1. A shadow is written
while nobody is being answered, so that clients who never pause would see none: each waits before a question, for --pause in the mean.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.clone import machine
from bench.served import Client, Heard, Json, Server, bodies_of, prompts, second_version, workspace_of
from bench.speed.report import rows_of
from bench.speed.serving import moments
from rlhf import config
from rlhf.registry.versions import connect

LIMIT = 64
KEPT = ("  keep: consented", "  keep: all")
SHADOWED = ("shadow: 0.0", "shadow: 1.0")


def main(
    model: Annotated[Path | None, typer.Option(help="The folder of a model; without it, a random one of the sandbox's shape.")] = None,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 4,
    requests: Annotated[int, typer.Option(help="Requests of a round.")] = 200,
    rounds: Annotated[int, typer.Option(help="Rounds, in turn.")] = 3,
    pause: Annotated[float, typer.Option(help="Mean seconds between a client's questions.")] = 0.2,
) -> None:
    """Print the milliseconds to the first text and to the last, and how many shadows were written meanwhile."""
    with tempfile.TemporaryDirectory(prefix="rlhf-shadows-") as place:
        root = workspace_of(Path(place) / "work", model and model.resolve(), KEPT)
        number = second_version(root)
        connect(root, config.load(root / "params.yaml")).set_registered_model_alias("assistant", "candidate", str(number))
        params = root / "params.yaml"
        content = params.read_text(encoding="utf-8")
        bodies = bodies_of(prompts(requests), LIMIT, stream=True, temperature=1.0)
        heard: dict[str, list[Heard]] = {"without": [], "with": []}
        written = 0.0
        for name in list(heard) * rounds:
            params.write_text(content.replace(*SHADOWED) if name == "with" else content, encoding="utf-8")
            with Server(root) as server:
                asyncio.run(ask(server.port, bodies[:: requests // 16], clients, 0))  # to get ready
                found = asyncio.run(ask(server.port, bodies, clients, pause))
                written += asyncio.run(shadows(server))
            assert all(one.status == 200 and one.whole for one in found)
            heard[name] += found
    rows = [
        [
            f"{name} shadows",
            *(f"{1000 * value:.0f}" for kind in ("first", "seconds") for value in moments([getattr(one, kind) for one in all_of])),
        ]
        for name, all_of in heard.items()
    ]
    told = ["milliseconds", "first text, median", "99th percentile", "last text, median", "99th percentile"]
    print(machine(), *rows_of(told, rows), sep="\n")
    answers = requests * rounds
    length = statistics.fmean(one.tokens for one in heard["without"])
    print(f"{clients} clients, {length:.0f} tokens an answer, {pause} s between questions; {written:.0f} shadows beside {answers} answers")


async def ask(port: int, bodies: list[Json], clients: int, pause: float) -> list[Heard]:
    """Have clients ask all of it, each with a pause before each question."""
    waiting, found = iter(bodies), []
    draw = random.Random(1)

    async def client() -> None:
        async with Client(port) as own:
            for body in waiting:
                await asyncio.sleep(draw.uniform(0, 2 * pause))
                found.append(await own.ask(body))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def shadows(server: Server) -> float:
    """How many have been written."""
    _, content = await server.get("/metrics")
    lines = [line for line in content.decode().splitlines() if line.startswith("rlhf_shadows_total") and "written" in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


if __name__ == "__main__":
    typer.run(main)
