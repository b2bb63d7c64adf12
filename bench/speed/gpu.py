"""Speed on one GPU: models of some 1.3 billion weights in bf16, 64 prompts of 256 tokens, answers of up to 256.

python bench/speed/gpu.py                          both models: four minutes on an H200
python bench/speed/gpu.py --only opt               one of them
python bench/speed/gpu.py --page bench/speed/RESULTS.md   and its part of that page
python bench/speed/gpu.py --profile                then, the kernels that one more step consists of

Random weights, so only the speed means something. Generation is the engine's (rlhf/rollout/) against transformers' `generate` of its own
model, in turn on the same weights and prompts; how long each answer gets is laid down beforehand (`planned_lengths`, workload.py). Beside
it stands what no program could beat on this GPU: each decoding step reads all weights but the embeddings once, and the keys and values of
every answer in the making; prompts cost their products. The rates of memory and of matrix products are measured first. A PPO step is stage
ppo's own code, its four models on the one GPU, every answer at full length; of each phase, the share of the matrix rate that its products
come to.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

os.environ |= {"DS_ACCELERATOR": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # before they are loaded

import torch
import typer
from rich.table import Table
from transformers import PreTrainedModel

from bench.speed import reference_ppo as reference
from bench.speed.report import console, rows_of, versions, write_section
from bench.speed.sides import free_port, place_of
from bench.speed.workload import CONTEXT, NEVER, OPTIMIZER, job_in, jobs, load_plain, planned_lengths, workspace
from rlhf.engine.distributed import start
from rlhf.engine.speed import Clock, Products, matrix_rate, peak_memory
from rlhf.rollout.experience import Experience
from rlhf.rollout.generate import Rollouts, generate
from rlhf.rollout.sampling import Sampling
from rlhf.stages import answering, ppo
from rlhf.stages.updates import mini_batches

PROMPTS, TOKENS, LIMIT = 64, 256, 256
PLANS = ("full", "varied")
NO_TOKEN, PAD = -1, 0
KERNELS = 28  # that a profile names, at most
COMMON = {"hidden_size": 2048, "num_attention_heads": 32, "max_position_embeddings": 2048}
SIZES: dict[str, dict[str, Any]] = {  # of OPT-1.3B and Llama-3.2-1B
    "opt": {**COMMON, "vocab_size": 50272, "num_hidden_layers": 24, "ffn_dim": 8192, "word_embed_proj_dim": 2048},
    "llama": {**COMMON, "vocab_size": 128256, "num_hidden_layers": 16, "intermediate_size": 8192, "num_key_value_heads": 8},
}


@dataclass(frozen=True)
class Generation:
    model: str
    weights: int
    answers: str
    ours: float  # answer tokens per second, median of the rounds
    peer: float
    ratios: list[float]  # ours to the peer's, of each round
    bound: float  # answer tokens per second at the rates of memory and matrix products


@dataclass(frozen=True)
class Phase:
    model: str
    phase: str
    seconds: float
    tokens_per_second: float
    utilisation: float  # of the matrix rate


def main(
    only: Annotated[str, typer.Option(help="A part of the names of the models wanted.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds, after one that does not count.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
    page: Annotated[Path | None, typer.Option(help="Where to write the tables as a part of a page.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Print the kernels of one more step, by the GPU's time in each.")] = False,
) -> None:
    """Print tokens per second of both sides and of the bound, and what a PPO step takes."""
    context = multiprocessing.get_context("spawn")  # each model in a process of its own, with all of the GPU's memory
    results = []
    for family in SIZES:
        if only in family:
            result = context.Queue()
            process = context.Process(target=measure, args=(family, rounds, profile, result))
            process.start()
            while process.is_alive() and result.empty():
                process.join(1)
            results.append(result.get(timeout=10))
            process.join()
    generations, phases = ([row for found in results for row in found[name]] for name in ("generation", "ppo"))
    for drawn in tables(generations, phases):
        console().print(drawn)
    found = results[0] | {
        "versions": versions(),
        "peak_memory_gib": {found["ppo"][0].model: found["peak_memory_gib"] for found in results},
        "generation": [asdict(row) for row in generations],
        "ppo": [asdict(row) for row in phases],
    }
    print(json.dumps(found))
    if output:
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if page:
        write_section(page, "Speed on a GPU", markdown(found))


def measure(family: str, rounds: int, profile: bool, result: Any) -> None:
    """In a process of its own: tell what one model gives."""
    generations: list[Generation] = []
    values = {
        "steps": rounds + 1,
        "rollout_batch_size": PROMPTS,
        "mini_batch_size": PROMPTS // 2,
        "max_prompt_tokens": TOKENS,
        "max_answer_tokens": LIMIT,
        "mixture_coefficient": 0.0,
        "critic_warmup_steps": 0,
        "max_approx_kl": NEVER,
        "actor": OPTIMIZER,
        "critic": OPTIMIZER,
    }
    params: dict[str, dict[str, Any]] = {"ppo": values, "launch": {"jobs": jobs(tokens=8192)}}
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, 4000, (PROMPTS, TOKENS), generator=generator).tolist()
    with workspace(family, None, 8, CONTEXT, params, device="cuda", precision="bf16", **SIZES[family]) as place:
        job = job_in(place.root, "ppo", "cuda")
        os.environ |= place_of(0, 1, free_port())
        device = start(job)
        rates = {"memory": memory_rate(device), "products": matrix_rate(device, torch.bfloat16)}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        models, critic = ppo.load_models(job, place.tokenizer, device)
        actor = models.actor.module
        plain = cast(Any, load_plain(job.input("models/sft"), "bf16")).to(device)
        for plan in PLANS:
            lengths = planned_lengths(PROMPTS, LIMIT, plan)
            seconds = [
                (timed(partial(ours, actor, prompts, lengths)), timed(partial(peer, plain, prompts, lengths))) for _ in range(rounds + 1)
            ][1:]
            least = bound(actor, lengths, rates)
            mine, others = (sum(lengths) / statistics.median(pair[side] for pair in seconds) for side in (0, 1))
            ratios = [other / one for one, other in seconds]
            generations.append(Generation(family, actor.num_parameters(), plan, mine, others, ratios, sum(lengths) / least))
            print(generations[-1], flush=True)  # a run may be cut off
        del plain
        torch.cuda.empty_cache()
        setattr(answering, "generate", endless)  # noqa: B010  # its type would not take it
        clocks = [ppo_step(job, models, critic, prompts, step, device) for step in range(rounds + 1)][1:]
        phases = shares(family, models, critic, clocks, rates["products"])
        print(*phases, sep="\n", flush=True)
        found = {
            "machine": torch.cuda.get_device_name(device),
            "bytes_per_second": rates["memory"],
            "operations_per_second": rates["products"],
            "peak_memory_gib": peak_memory(device),
        }
        if profile:
            ppo_step(job, models, critic, prompts, rounds + 1, device, kernels)
        result.put(found | {"generation": generations, "ppo": phases})


def endless(*arguments: Any, **options: Any) -> Rollouts:
    """`generate`, every answer at full length."""
    return generate(*arguments, **options | {"eos_id": NO_TOKEN})


def timed(act: Callable[[], object]) -> float:
    clock = Clock(torch.device("cuda", 0))
    act()
    clock.stop("all")
    return clock.total


def ours(model: PreTrainedModel, prompts: list[list[int]], lengths: list[int]) -> None:
    found = generate(
        model,
        prompts,
        range(len(prompts)),
        Sampling(1.0, 0, 1.0, max(lengths)),
        eos_id=NO_TOKEN,
        pad_id=PAD,
        slots=len(prompts),
        stop=lambda number, answer: len(answer) == lengths[number],
    )
    assert found.lengths == lengths


def peer(model: PreTrainedModel, prompts: list[list[int]], lengths: list[int]) -> None:
    model.eval()
    torch.use_deterministic_algorithms(False)  # which costs it time, and is not its own setting
    made = reference.generate(model, prompts, lengths, PAD)
    torch.use_deterministic_algorithms(True)
    model.train()
    assert made.shape == (len(prompts), max(lengths))


def ppo_step(
    job: Any,
    models: Any,
    critic: Any,
    prompts: list[list[int]],
    step: int,
    device: torch.device,
    watched: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Clock:
    """Steps 1 to 4 of stage ppo, as its `main` has them, each phase watched if wanted."""
    clock = Clock(device)
    with watched("generation"):
        rollouts = answering.roll_out(job, models, prompts, ppo.answer_seeds(job, step, len(prompts)), step, clock)
    with watched("scoring"):
        experience = Experience.of(ppo.score(job, models, critic, [], rollouts), device)
        clock.stop("scoring")
    with watched("training"):
        targets, _ = ppo.advantages(experience, job.params.ppo, job.params.ppo.kl.coefficient)
        ppo.update(job, models, critic, experience, targets, mini_batches(job, experience, [], None, step), step)
        clock.stop("training")
    return clock


@contextmanager
def kernels(phase: str) -> Iterator[None]:
    """Print what the GPU does inside the block: the kernels that take longest, their time, its share, how often."""
    clock = Clock(torch.device("cuda", 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watch:
        yield
        clock.stop("all")
    found = sorted(watch.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in found)
    print(f"{phase}: {clock.total:.3f} s, kernels {busy / 1e6:.3f} s", flush=True)
    for event in found[:KERNELS]:
        taken = event.self_device_time_total
        print(f"{taken / 1e3:9.2f} ms {taken / busy:6.1%} {event.count:7} × {event.key[:110]}", flush=True)


def shares(family: str, models: Any, critic: Any, clocks: list[Clock], rate: float) -> list[Phase]:
    """What each phase took, and how much of the matrix rate its products come to."""
    tokens, answered = PROMPTS * (TOKENS + LIMIT), PROMPTS * LIMIT
    actor, valuing = Products.of(models.actor.module), Products.of(critic.module)
    operations = {
        "generation": actor.forward(tokens, answered),
        "scoring": 2 * actor.forward(tokens, answered) + 2 * valuing.forward(tokens),  # with reference and reward model
        "training": actor.training(tokens, answered) + valuing.training(tokens),
    }
    operations["step"] = sum(operations.values())
    counted = {"generation": answered, "scoring": tokens, "training": tokens, "step": answered}
    found = []
    for phase, work in operations.items():
        seconds = statistics.median(clock.total if phase == "step" else clock.seconds[phase] for clock in clocks)
        found.append(Phase(family, phase, seconds, counted[phase] / seconds, work / seconds / rate))
    return found


# ---------------------------------------------------------------------------------------------------------------- the bound


def memory_rate(device: torch.device) -> float:
    """Bytes per second of a copy within the GPU's memory, read and written ones, best of some."""
    source = torch.ones(2**30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = [timed(partial(target.copy_, source)) for _ in range(5)]
    return 2 * source.nbytes / min(seconds)


def bound(model: PreTrainedModel, lengths: list[int], rates: dict[str, float]) -> float:
    """Seconds of a rollout at the GPU's rates: prompts at that of products, decoding steps at that of memory."""
    products, size = Products.of(model), model.dtype.itemsize
    weights = (products.body + products.output) * size
    text = cast(Any, model.config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    each = 2 * text.num_hidden_layers * heads * (text.hidden_size // text.num_attention_heads) * size  # bytes of a token's keys and values
    # the first token of an answer comes with its prompt
    held = sum(each * (TOKENS + step) for length in lengths for step in range(1, length))
    read = (max(lengths) - 1) * weights + held
    return read / rates["memory"] + products.forward(PROMPTS * TOKENS, PROMPTS) / rates["products"]


# ------------------------------------------------------------------------------------------------------------------- tables

GENERATION = ("model", "answers", "ours, tokens/s", "generate, tokens/s", "ratio", "of the rounds", "bound, tokens/s", "share of the bound")
PPO = ("model", "phase", "seconds", "tokens/s", "share of the matrix rate")


def cells(generations: list[Generation], phases: list[Phase]) -> tuple[list[list[str]], list[list[str]]]:
    one = [
        [
            row.model,
            row.answers,
            f"{row.ours:.0f}",
            f"{row.peer:.0f}",
            f"{statistics.median(row.ratios):.2f}",
            f"{min(row.ratios):.2f} … {max(row.ratios):.2f}",
            f"{row.bound:.0f}",
            f"{row.ours / row.bound:.0%}",
        ]
        for row in generations
    ]
    two = [[row.model, row.phase, f"{row.seconds:.3f}", f"{row.tokens_per_second:.0f}", f"{row.utilisation:.0%}"] for row in phases]
    return one, two


def tables(generations: list[Generation], phases: list[Phase]) -> list[Table]:
    drawn = []
    for title, headings, rows in zip(("Generation", "A PPO step"), (GENERATION, PPO), cells(generations, phases), strict=True):
        table = Table(*headings, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        drawn.append(table)
    return drawn


def markdown(found: dict[str, Any]) -> str:
    generations = [Generation(**row) for row in found["generation"]]
    one, two = cells(generations, [Phase(**row) for row in found["ppo"]])
    sizes = ", ".join(dict.fromkeys(f"{row.model} of {row.weights / 1e9:.2f} billion weights" for row in generations))
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    memory = ", ".join(f"{gib:.0f} GiB ({name})" for name, gib in found["peak_memory_gib"].items())
    return "\n".join(
        [
            "Written by `python bench/speed/gpu.py --page bench/speed/RESULTS.md`, both sides in turn, on the same work.",
            "",
            f"One {found['machine']}: a copy within its memory runs at {found['bytes_per_second'] / 1e12:.2f} TB/s, bf16 products of large "
            f"matrices at {found['operations_per_second'] / 1e12:.0f} TFLOP/s. {packages}.",
            "",
            f"Random models in bf16, {sizes}; {PROMPTS} prompts of {TOKENS} tokens, answers of up to {LIMIT}. The bound is explained in "
            "bench/speed/gpu.py.",
            "",
            *rows_of(GENERATION, one),
            "",
            f"A PPO step on {PROMPTS} answers of {LIMIT} tokens, two updates; actor, critic, reference and reward model on the one GPU. "
            f"GPU memory at most: {memory}.",
            "",
            *rows_of(PPO, two),
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
