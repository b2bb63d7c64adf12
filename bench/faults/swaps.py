"""The champion is another one every few seconds, by promotion and by rollback, while clients ask the assistant's server.

python bench/faults/swaps.py                       two minutes, 32 clients, a random model of the sandbox's shape
python bench/faults/swaps.py --model models/ppo    a trained one

No request may fail; each answer, whole or in a stream, names one version, and its text is what an engine with that version's files writes,
in a process of its own, to the same prompt with the same seed.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from bench.served import Client, Heard, Json, Server, bodies_of, prompts, second_version, workspace_of
from rlhf import config, registry
from rlhf.models.dialogues import encode_prompt
from rlhf.serving.engine import Engine
from rlhf.serving.requests import Piece, Request, events
from rlhf.serving.writer import Writer

LIMIT, QUESTIONS = 48, 96
Told = tuple[int, Heard]  # number of the question


def main(
    seconds: Annotated[float, typer.Option(help="So long.")] = 120,
    every: Annotated[float, typer.Option(help="Seconds from one promotion or rollback to the next.")] = 5,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 32,
    model: Annotated[Path | None, typer.Option(help="The folder of a model; without it, a random one.")] = None,
) -> None:
    """Print what was answered. Exit code 1: a request failed, or an answer is not that of the version it names."""
    with tempfile.TemporaryDirectory(prefix="rlhf-swaps-") as place:
        root = workspace_of(Path(place) / "work", model and model.resolve(), ("refresh_seconds: 2.0", "refresh_seconds: 0.5"))
        second_version(root)
        bodies = [body | {"stream": number % 2 == 0} for number, body in enumerate(bodies_of(prompts(QUESTIONS), LIMIT, temperature=1.0))]
        with Server(root) as server:
            stopped = threading.Event()
            swapping = threading.Thread(target=swap, args=(root, every, stopped))
            swapping.start()
            told = asyncio.run(ask(server.port, bodies, clients, seconds))
            stopped.set()
            swapping.join()
            _, metrics = asyncio.run(server.get("/metrics"))
        wrong = faults(root, bodies, told)
    swaps = next(line.split()[-1] for line in metrics.decode().splitlines() if line.startswith("rlhf_swaps "))
    by_version = Counter(heard.models for _, heard in told)
    longest = max(heard.seconds for _, heard in told)
    counted = ", ".join(f"{number} by {'/'.join(names)}" for names, number in sorted(by_version.items()))
    print(f"{len(told)} answers ({counted}), {float(swaps):.0f} swaps, longest answer {longest:.2f} s, {len(wrong)} failed or mixed")
    print(*wrong[:10], sep="\n", file=sys.stderr)
    if wrong or len(by_version) < 2:
        raise typer.Exit(1)


def swap(root: Path, every: float, stopped: threading.Event) -> None:
    """Promote the second version, go back to the first, and so on."""
    params = config.load(root / "params.yaml")
    while not stopped.wait(every):
        champion = registry.aliases(root, params)["champion"]
        if champion == 1:
            registry.promote(registry.find(root, params, 2), champion, root, params, by="bench", why="swap")
        else:
            registry.rollback(champion, root, params, by="bench", why="swap")


async def ask(port: int, bodies: list[Json], clients: int, seconds: float) -> list[Told]:
    """What clients hear in that time, each asking one question after the other."""
    until, found = time.monotonic() + seconds, []

    async def client(number: int) -> None:
        async with Client(port) as own:
            while time.monotonic() < until:
                found.append((number, await own.ask(bodies[number])))
                number = (number + clients) % len(bodies)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return found


def faults(root: Path, bodies: list[Json], told: list[Told]) -> list[str]:
    """What is wrong with the answers."""
    params = config.load(root / "params.yaml")
    texts = {}
    for number in (1, 2):
        folder = registry.model_folder(f"models:/assistant/{number}", root, params)
        writer = Writer(folder, len(bodies), params.serving.max_prompt_tokens + params.serving.max_tokens)
        with closing(Engine(writer, len(bodies), params.serving.threads)) as engine:
            texts[f"assistant/{number}"] = [text_of(engine, body) for body in bodies]
    wrong = []
    for number, heard in told:
        if heard.status != 200 or not heard.whole or len(heard.models) != 1:
            wrong.append(f"question {number}: {heard}")
        elif heard.text != texts[heard.models[0]][number]:
            wrong.append(f"question {number}: {heard.models[0]} writes {texts[heard.models[0]][number]!r}, and this came: {heard.text!r}")
    return wrong


def text_of(engine: Engine, body: Json) -> str:
    prompt = tuple(encode_prompt(engine.writer.tokenizer, body["messages"]))
    asked = Request(prompt, body["max_tokens"], body["seed"], 600, body["temperature"])
    return "".join(event.text for event in events(engine, asked) if isinstance(event, Piece))


if __name__ == "__main__":
    typer.run(main)
