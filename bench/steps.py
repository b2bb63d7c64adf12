"""Where the time of a training step goes: the stages' own code on random models of some 12 million weights, profiled by torch.

python bench/steps.py                              sft, reward, dpo and ppo, of Llama and OPT: five minutes on one core
python bench/steps.py --only llama/ppo             one of them
python bench/steps.py --pairs pairs.jsonl.gz       texts of a file of Anthropic-style pairs instead of the sandbox's

fp32, vocabulary of 4096, prompts of up to 128 tokens. A stage runs some steps: the first is left out, the last one is profiled, the others
are timed. Kinds of work are those of torch's operations, by the processor's time in each without what it calls.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import config
from rlhf.data.sandbox import make_rows
from rlhf.job import Job, write_lines
from rlhf.models.policy import save_model
from rlhf.models.scalar import initialise_head, load_scalar
from rlhf.models.tokenizer import build_tokenizer

VOCABULARY, CONTEXT, LONGEST = 4096, 512, 128
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": CONTEXT}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "intermediate_size": 1152, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "opt": {**SIZES, "ffn_dim": 1536, "word_embed_proj_dim": 384},
}
STEPS, ROWS = 4, 16  # ROWS: of a batch; half as many pairs; twice as many answers of ppo
STAGES = ("sft", "reward", "dpo", "ppo")
# what the names of torch's operations have in them → what they are; the first that fits
KINDS = {
    "mm": "matrix products",
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
    micro: Annotated[int | None, typer.Option(help="Tokens of a micro-batch; else the sandbox's.")] = None,
) -> None:
    """Print seconds and tokens per second of a step, and the milliseconds of processor time of each kind of work."""
    shown = Table(
        title=f"A step: seconds, tokens per second, milliseconds by kind of work; answers of up to {answers}", title_justify="left"
    )
    for heading in ("model/stage", "tokens", "seconds", "tokens/s", *HEADINGS):
        shown.add_column(heading, justify="left" if heading == "model/stage" else "right")
    context = multiprocessing.get_context("spawn")
    for name in only or [f"{family}/{stage}" for family in MODELS for stage in STAGES]:
        family, stage = name.split("/")
        root = Path(tempfile.mkdtemp(prefix="rlhf-steps-"))
        try:
            result = context.Queue()
            process = context.Process(target=measure, args=(root, family, stage, pairs, answers, threads, micro, result))
            process.start()
            process.join()
            if process.exitcode:
                raise typer.Exit(1)
            found = result.get()
        finally:
            shutil.rmtree(root, ignore_errors=True)
        cells = [f"{1000 * found['kinds'].get(heading, 0.0):.0f}" for heading in HEADINGS]
        shown.add_row(name, f"{found['tokens']:.0f}", f"{found['seconds']:.2f}", f"{found['tokens'] / found['seconds']:.0f}", *cells)
        print(name, json.dumps(found["logged"]), flush=True)
    Console(width=200).print(shown)


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


def measure(root: Path, family: str, stage: str, pairs: Path | None, answers: int, threads: int, micro: int | None, result: Any) -> None:
    """In a process of its own: run the stage and tell what its steps took."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.dup2(os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT), 1)
    torch.set_num_threads(threads)
    tokens = make_workspace(root, family, stage, pairs, answers, micro)
    job = WatchedJob(stage, config.load(root / "params.yaml"), root, root / "runs", "cpu", 0, 1, 0)
    job.folder.mkdir()
    import_module(f"rlhf.stages.{stage}").main(job)
    seconds = statistics.median(after - before for before, after in zip(job.times, job.times[1:-1], strict=False))
    kinds = dict.fromkeys(HEADINGS, 0.0)
    for event in job.profiler.key_averages():
        if event.key.startswith("aten::"):
            kind = next((kind for part, kind in KINDS.items() if part in event.key), "arithmetic")
            kinds[kind] += event.self_cpu_time_total / 1e6
    kinds["outside torch"] = max(0.0, job.times[-1] - job.times[-2] - sum(kinds.values()))
    result.put({"seconds": seconds, "tokens": tokens, "kinds": kinds, "logged": job.logged})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_workspace(root: Path, family: str, stage: str, file: Path | None, answers: int, micro: int | None) -> float:
    """Params, models and prepared data; gives the tokens of a step on average: of prompts and answers, each pair's prompt twice."""
    texts = read(file)
    tokenizer = build_tokenizer([text for three in texts for text in three], VOCABULARY, CONTEXT)
    rows: list[dict[str, Any]] = []
    sizes: list[list[int]] = []
    for prompt, *sides in texts:
        begin, *ends = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *sides))
        cut = [str(tokenizer.decode(end[: answers - 2])) for end in ends]
        if 8 < len(begin) < LONGEST - 8:
            rows.append({"prompt": [{"role": "user", "content": prompt}], "chosen": cut[0], "rejected": cut[1]})
            sizes.append([len(begin) + 4, *(min(len(end), answers - 2) + 1 for end in ends)])
    rows, sizes = rows[: STEPS * 2 * ROWS], sizes[: STEPS * 2 * ROWS]
    assert len(rows) == STEPS * 2 * ROWS, f"{len(rows)} rows are of the lengths wanted, {STEPS * 2 * ROWS} are needed"
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MODELS[family]))
    for name in ("base", "sft"):
        save_model(model, tokenizer, root / "models" / name)
    scalar = load_scalar(root / "models/base", tokenizer, "fp32")
    initialise_head(scalar, 1)
    scalar.model.config.reward_mean, scalar.model.config.reward_std = 0.0, 1.0
    save_model(scalar.model, tokenizer, root / "models/reward")
    write_lines(root / "data/prepared/sft.jsonl", [{"messages": [*row["prompt"], said(row["chosen"])]} for row in rows])
    for name, part in (("reward", rows), ("heldout_pairs", rows[:2])):
        write_lines(root / f"data/prepared/{name}.jsonl", part)
    write_lines(root / "data/prepared/ppo.jsonl", [{"prompt": row["prompt"], "gold": None} for row in rows])
    write_lines(root / "data/prepared/text.jsonl", [{"text": row["prompt"][0]["content"]} for row in rows])
    raw = yaml.safe_load((Path(__file__).parents[1] / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    for name, batch in (("sft", ROWS), ("reward", ROWS // 2), ("dpo", ROWS // 2)):
        raw[name] |= {"batch_size": batch, "epochs": STEPS * batch / len(rows), "max_tokens": CONTEXT, "checkpoint_every": 10**6}
    raw["base"] |= {"context_tokens": CONTEXT}
    if micro:
        raw["launch"]["jobs"][stage] |= {"micro_batch_tokens": micro}
    raw["ppo"] |= {"steps": STEPS, "rollout_batch_size": 2 * ROWS, "mini_batch_size": ROWS, "max_answer_tokens": answers}
    raw["ppo"] |= {"critic_warmup_steps": 0, "max_approx_kl": 1e6, "checkpoint_every": 10**6}
    (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    asked, chosen, rejected = (statistics.fmean(column) for column in zip(*sizes, strict=True))
    return {"sft": ROWS * (asked + chosen), "ppo": 2 * ROWS * (asked + answers)}.get(stage, ROWS // 2 * (2 * asked + chosen + rejected))


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(file: Path | None) -> Sequence[tuple[str, str, str]]:
    """Prompt, chosen and rejected answer: pairs of a file, or pieces of the sandbox's passages in their places."""
    if file is None:
        passages = [row["text"] for row in make_rows("text", 3000, 1, 0.0)]
        generator = random.Random(1)

        def piece() -> str:
            return " ".join(generator.sample(passages, 3))[: generator.randint(40, 500)]

        return [(piece(), piece(), piece()) for _ in range(STEPS * 4 * ROWS)]
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    end = "\n\nAssistant:"
    begins = [row["chosen"].rindex(end) + len(end) for row in rows]
    return [(row["chosen"][:at], row["chosen"][at:], row["rejected"][at:]) for row, at in zip(rows, begins, strict=True)]


if __name__ == "__main__":
    typer.run(main)
