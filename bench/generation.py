"""Speed of the rollout engine against transformers' `generate`: same weights, prompts, sampling and lengths, in turn on this machine.

python bench/generation.py                         all cases: some minutes on one core
python bench/generation.py --quick                 the short answers, fewer rounds
python bench/generation.py --profile               no speeds: where the processor's time goes, answers of 64 tokens
python bench/generation.py --pairs pairs.jsonl.gz  prompts of a file of Anthropic-style pairs instead of the sandbox's

64 prompts of 10 to 128 tokens, two random models of some 12 million weights, fp32, sampling at temperature 1 among all tokens. How long
each answer gets is laid down beforehand, and both sides obey the plan by their own means of stopping: `full`, every answer to the limit;
`varied`, limit · u^1.5 for 64 evenly spread u, so 40% of the limit on average, few long ones. Useful tokens are those up to each answer's
planned end. `generate` pads to the longest prompt and goes on until the last row has ended; it computes no log-probabilities, the engine
does.
"""

from __future__ import annotations

import cProfile
import gzip
import json
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from clone import machine
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from rlhf.data.batches import pad_rows
from rlhf.data.sandbox import make_rows
from rlhf.models.tokenizer import build_tokenizer
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling
from rlhf.tensors import mask_from_lengths

PROMPTS, VOCABULARY, PAD, NO_TOKEN = 64, 4096, 0, -1
SHORTEST, LONGEST = 10, 128  # prompts, in tokens
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": 512}
MODELS: dict[str, dict[str, Any]] = {
    "opt": {**SIZES, "ffn_dim": 1536, "word_embed_proj_dim": 384},
    "llama": {**SIZES, "intermediate_size": 1152, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
LIMITS = (64, 256)
PLANS: dict[str, Callable[[float], float]] = {"full": lambda u: 1.0, "varied": lambda u: u**1.5}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Answers of up to 64 tokens only, three rounds.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print milliseconds of processor time per token, by function.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with `chosen` dialogues of Human and Assistant; may end in .gz.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; the median of their ratios counts.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of either side.")] = 1,
    slots: Annotated[int, typer.Option(help="Answers that the engine writes at a time.")] = PROMPTS,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Print useful answer tokens per second of both, and the median of the rounds' ratios."""
    torch.set_num_threads(threads)
    if profile:
        Console(width=None if sys.stdout.isatty() else 160).print(phases(pairs, slots))
        return
    found = cases(pairs, (LIMITS[0],) if quick else LIMITS, 3 if quick else rounds, slots)
    Console(width=None if sys.stdout.isatty() else 160).print(table(found))
    if output:
        output.write_text(json.dumps({"machine": machine(), "cases": found}, indent=2) + "\n", encoding="utf-8")


def cases(pairs: Path | None, limits: tuple[int, ...], rounds: int, slots: int) -> list[dict[str, Any]]:
    """Each model, limit and plan: {name, ours, peer, ratio, ratios, unit, setting}."""
    prompts = make_prompts(pairs)
    mean = statistics.fmean(map(len, prompts))
    found = []
    for family in MODELS:
        model = make_model(family)
        for limit in limits:
            for plan, share in PLANS.items():
                lengths = [max(1, round(limit * share((i + 0.5) / PROMPTS))) for i in range(PROMPTS)]
                random.Random(2).shuffle(lengths)
                measured = [(ours(model, prompts, lengths, slots), peer(model, prompts, lengths)) for _ in range(rounds)]
                rates = [[sum(lengths) / seconds for seconds in side] for side in zip(*measured, strict=True)]
                ratios = [one / other for one, other in zip(*rates, strict=True)]
                found.append(
                    {
                        "name": f"generation, {family}, up to {limit}, {plan}",
                        "ours": statistics.median(rates[0]),
                        "peer": statistics.median(rates[1]),
                        "ratio": statistics.median(ratios),
                        "ratios": ratios,
                        "unit": "useful answer tokens/s",
                        "setting": f"{model.num_parameters() / 1e6:.1f} million weights, {slots} slots, {torch.get_num_threads()} threads, "
                        f"{rounds} rounds, {PROMPTS} prompts of {mean:.0f} tokens on average, answers of {statistics.fmean(lengths):.0f}",
                    }
                )
    return found


def make_prompts(pairs: Path | None) -> list[list[int]]:
    """Token ids, by a tokenizer that is trained on the texts."""
    texts = dialogues(pairs) if pairs else passages()
    tokenizer = build_tokenizer(texts, VOCABULARY, LONGEST)
    encoded = [ids for ids in tokenizer(texts, verbose=False)["input_ids"] if SHORTEST <= len(ids) <= LONGEST]
    return random.Random(1).sample(encoded, PROMPTS)


def dialogues(path: Path) -> list[str]:
    """The prompts of a file of pairs: all before the last answer."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file]
    end = "\n\nAssistant:"
    return [text[: text.rindex(end) + len(end)] for text in texts]


def passages() -> list[str]:
    """Some of the sandbox's passages, one to three in a row."""
    rows = [row["text"] for row in make_rows("text", 1500, 1, 0.0)]
    generator = random.Random(1)
    return [" ".join(generator.sample(rows, generator.randint(1, 3)))[: generator.randint(40, 600)] for _ in rows]


def make_model(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MODELS[family])).eval())


def ours(model: PreTrainedModel, prompts: list[list[int]], lengths: list[int], slots: int) -> float:
    """Seconds of the engine."""
    sampling = Sampling(1.0, 0, 1.0, max(lengths))
    start = time.perf_counter()
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
    seconds = time.perf_counter() - start
    assert found.lengths == lengths
    return seconds


class Planned(StoppingCriteria):
    """Each row ends at its planned length."""

    def __init__(self, ends: torch.Tensor) -> None:
        self.ends = ends  # (B,) columns, prompt included

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return self.ends <= input_ids.shape[1]


def peer(model: PreTrainedModel, prompts: list[list[int]], lengths: list[int]) -> float:
    """Seconds of transformers' generate."""
    width = max(map(len, prompts))
    start = time.perf_counter()
    ids = pad_rows([prompt[::-1] for prompt in prompts], PAD, "cpu").flip(1)
    begins = torch.tensor([width - len(prompt) for prompt in prompts])
    made = cast(Any, model).generate(
        ids,
        attention_mask=mask_from_lengths(torch.full_like(begins, width), width, start=begins).long(),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(lengths),
        eos_token_id=None,
        pad_token_id=PAD,
        stopping_criteria=StoppingCriteriaList([Planned(width + torch.tensor(lengths))]),
    )
    seconds = time.perf_counter() - start
    assert made.shape[1] == width + max(lengths)
    return seconds


# what torch calls it → what it is
PARTS = {
    "linear": "matrix products",
    "scaled_dot_product_attention": "attention",
    "cat": "concatenation",
    "clone": "copies",
    "reshape": "copies",
    "contiguous": "copies",
    "index_put": "copies",
    "cumsum": "sampling",
    "searchsorted": "sampling",
    "multinomial": "sampling",
    "softmax": "sampling",
}


def phases(pairs: Path | None, slots: int) -> Table:
    """Milliseconds of processor time by kind of work, of 64 answers of 64 tokens."""
    prompts, lengths = make_prompts(pairs), [LIMITS[0]] * PROMPTS
    drawn = Table(title="Milliseconds of processor time for each of 64 tokens, prompts included", title_justify="left")
    drawn.add_column("side")
    kinds = [*dict.fromkeys(PARTS.values()), "all else", "together"]
    for kind in kinds:
        drawn.add_column(kind, justify="right")
    for family in MODELS:
        model = make_model(family)
        sides = {"generate": partial(peer, model, prompts, lengths), "engine": partial(ours, model, prompts, lengths, slots)}
        for name, run in sides.items():
            run()
            watch = cProfile.Profile(time.process_time)
            watch.runcall(run)
            spent = dict.fromkeys(kinds, 0.0)
            for (_, _, function), (_, _, seconds, _, _) in cast(Any, pstats.Stats(watch)).stats.items():
                word = function.rstrip(">").split(" ")[-1].strip("'")
                builtin = "built-in" in function or "method" in function
                for kind in (PARTS.get(word, "all else") if builtin else "all else", "together"):
                    spent[kind] += 1000 * seconds / LIMITS[0]
            drawn.add_row(f"{family}, {name}", *(f"{spent[kind]:.1f}" for kind in kinds))
    return drawn


def table(found: list[dict[str, Any]]) -> Table:
    drawn = Table(title="Useful answer tokens per second", title_justify="left", caption=found[0]["setting"], caption_justify="left")
    for name in ("case", "engine", "generate", "ratio", "of the rounds"):
        drawn.add_column(name, justify="left" if name == "case" else "right")
    for case in found:
        spread = f"{min(case['ratios']):.2f} … {max(case['ratios']):.2f}"
        drawn.add_row(case["name"], f"{case['ours']:.0f}", f"{case['peer']:.0f}", f"{case['ratio']:.2f}", spread)
    return drawn


if __name__ == "__main__":
    typer.run(main)
