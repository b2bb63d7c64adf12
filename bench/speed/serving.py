"""The assistant's server under 64 clients at once, against one client, and against transformers' `generate`, one prompt after the other.

python bench/speed/serving.py                              a random model of the sandbox's shape: answers of 64 tokens
python bench/speed/serving.py --model models/ppo           a trained one: its answers end by themselves
python bench/speed/serving.py --page bench/speed/RESULTS.md the table as a page, too

The server is a process of its own, with the sandbox's params; clients share one event loop in this process, and stream. All three are asked
the same prompts with the same seeds, so that 64 clients and one get the same tokens, and `generate` writes as many for each prompt. The
first token is that of the first piece of text that a client receives. Before the rounds, all three answer a few prompts.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.served import Heard, Json, Server, ask_all, bodies_of, model_of, prompts, workspace_of
from bench.speed.report import Case, case, collect, console, processor, rows_of, spread, table, versions, write, write_section
from bench.speed.sides import Step, Stopwatch

LIMIT = 64
Round = dict[str, tuple[Step, list[Heard]]]


def main(
    model: Annotated[Path | None, typer.Option(help="The folder of a model; without it, a random one of the sandbox's shape.")] = None,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 64,
    requests: Annotated[int, typer.Option(help="Requests of a round: some waves of them.")] = 256,
    rounds: Annotated[int, typer.Option(help="Rounds; medians count.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of `generate`; the server has those of its params.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
    page: Annotated[Path | None, typer.Option(help="Where to write the table as a page.")] = None,
) -> None:
    """Print tokens/s of all three, their ratios, and the time to the first token."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="rlhf-serving-") as place:
        root = workspace_of(Path(place) / "work", model and model.resolve())
        bodies = bodies_of(prompts(requests), LIMIT, stream=True, temperature=1.0)
        with Server(root) as server:
            one_round(server, root, bodies[:clients:8], clients)  # memory is handed out by the system for the first time
            found = [one_round(server, root, bodies, clients) for _ in range(rounds)]
    what = f"{'a trained model' if model else 'a random model'} of the sandbox's shape, {requests} requests, {threads} threads"
    cases = collect(cases_of(found, clients, what))
    first = {name: moments([one.first for each in found for one in each[name][1]]) for name in ("one", "many")}
    console().print(table(cases))
    names = {"one": "1 client", "many": f"{clients} clients"}
    rows = [[names[name], *(f"{1000 * value:.0f}" for value in values)] for name, values in first.items()]
    lines = rows_of(["milliseconds to the first token", "median", "99th percentile"], rows)
    print(*lines, sep="\n")
    if output:
        write(output, cases, first_token=first)
    if page:
        write_section(page, "Serving", section(cases, lines))


def one_round(server: Server, root: Path, bodies: list[Json], clients: int) -> Round:
    """The three in turn, on the same work."""
    found: Round = {}
    for name, count in (("many", clients), ("one", 1)):
        began, used = time.perf_counter(), server.processor
        heard = asyncio.run(ask_all(server.port, bodies, count))
        found[name] = Step(time.perf_counter() - began, server.processor - used, 0), heard
        assert all(one.status == 200 and one.whole for one in heard)
    many, one = ([(said.text, said.tokens) for said in found[name][1]] for name in ("many", "one"))
    assert many == one, "an answer hangs on its neighbours"
    found["generate"] = generate(root, bodies, [tokens for _, tokens in one]), []
    return found


def generate(root: Path, bodies: list[Json], lengths: list[int]) -> Step:
    """What transformers takes for answers of those lengths, one after the other."""
    model, tokenizer = plain(root)
    watch = Stopwatch()
    for body, length in zip(bodies, lengths, strict=True):
        encoded = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            made = model.generate(**encoded, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length, eos_token_id=None)
        tokenizer.decode(made[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return watch.stop()


def plain(root: Path) -> tuple[Any, Any]:
    """The champion as transformers opens it."""
    from transformers import AutoModelForCausalLM

    model, (_, tokenizer) = AutoModelForCausalLM.from_pretrained(root / "models/ppo"), model_of(root / "models/ppo")
    model.generation_config.eos_token_id = None
    return model.eval(), tokenizer


def cases_of(found: list[Round], clients: int, what: str) -> list[Case]:
    work = [sum(said.tokens for said in each["many"][1]) for each in found]
    setting = f"{what}, {work[0] / len(found[0]['many'][1]):.0f} tokens an answer"
    pairs = {"1 client": "one", "one-by-one generate": "generate"}
    return [
        case(
            f"serving, {clients} clients against {said}",
            work,
            [(each["many"][0], each[name][0]) for each in found],
            "answer tokens/s",
            setting,
        )
        for said, name in pairs.items()
    ]


def moments(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    return statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]


def section(cases: list[Case], first: list[str]) -> str:
    rows = [[one["name"], one["setting"], f"{one['ours']:.4g}", f"{one['peer']:.4g}", f"{one['ratio']:.2f}", spread(one)] for one in cases]
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    told = [
        "Written by `python bench/speed/serving.py --page bench/speed/RESULTS.md`.",
        "",
        f"{os.cpu_count()} cores of {processor()}, and no other device; {packages}.",
        "",
    ]
    return "\n".join([*told, *rows_of(["case", "work", "ours, tokens/s", "peer", "ratio", "of the rounds"], rows), "", *first, ""])


if __name__ == "__main__":
    typer.run(main)
