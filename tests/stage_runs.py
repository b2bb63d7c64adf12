"""Real stages on tiny models, in processes of their own, for the tests that need them.

The words run one after the other in one process, which is a rank of a real process group. A word is STAGE or FOLDER/STAGE, the folder
(below the working directory) being a workspace with its own params.yaml. VARIANT at its end, as in sft:killed, changes what the stage
runs on from there to the end of the process:

    killed   dies by SIGKILL after its first checkpoint
    filled   fills its disk after its first checkpoint, up to room for some lines
    watched  prints where it listens, after its first checkpoint
    padded   lays tokens of padding behind each sequence, and shares no beginning
    off      says of each sampled token that its log-probability was 0.01 lower than it was
    compared prints how far each rollout's log-probabilities are from those under the weights at that moment, and under those before
    partitioned prints of each model that evaluate holds whether it is in parts
    unmeasured measures no held-out accuracy in the course of stage reward
    fp16     takes the processor for one that trains in fp16; it can, slowly, but DeepSpeed asks for instructions that few have
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil
import yaml

if TYPE_CHECKING:
    from rlhf.models.packed import Packed

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINED = ("base", "sft", "reward", "ppo")

# ------------------------------------------------------------------------------------------------- from the test's process


def run(root: Path, *words: str, code: int = 0, ranks: int = 1) -> str:
    """Run stages to their end on so many ranks; what rank 0 printed."""
    port = free_port()
    processes = [start(root, *words, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
    said = [process.end() for process in processes]
    assert [process.returncode for process in processes] == [code] * ranks, "\n".join(said)
    return said[0]


@dataclass(frozen=True)
class Rank:
    """A process that runs stages."""

    process: Any  # of multiprocessing
    log: Path

    @property
    def returncode(self) -> int | None:
        """None while it runs; −N where signal N ended it."""
        return self.process.exitcode

    def end(self) -> str:
        """Wait for its end; what it printed."""
        self.process.join()
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(root: Path, *words: str, rank: int, ranks: int, port: int) -> Rank:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place["GLOO_SOCKET_IFNAME"] = "lo"  # as the launcher has it
    descriptor, name = tempfile.mkstemp(prefix=f"rank-{rank}-", suffix=".txt", dir=root)
    os.close(descriptor)
    process = _server().Process(target=rank_main, args=(root, words, {key: str(value) for key, value in place.items()}, Path(name)))
    process.start()
    return Rank(process, Path(name))


@cache
def _server() -> Any:
    """Where ranks are forked from: a process that has loaded torch, transformers and DeepSpeed once, which takes seconds."""
    forkserver.set_forkserver_preload([f"rlhf.stages.{stage}" for stage in (*TRAINED, "awac", "grpo", "dpo", "iterative", "evaluate")])
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def rank_main(root: Path, words: Sequence[str], place: dict[str, str], log: Path) -> None:
    """In the process of a rank."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= place
    os.chdir(root)
    try:
        main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@cache
def _ports() -> Iterator[int]:
    """Below those that the system gives out by itself, so that nobody takes one before it is used; of each worker its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 12_000 + 1_000 * (worker % 20)
    start = random.randrange(1_000)  # another test run on this machine begins elsewhere
    return (first + (start + number) % 1_000 for number in itertools.count())


def free_port() -> int:
    """A port that nobody listens at, and that `free_port` gives to nobody else."""
    for port in _ports():
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("endless")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tiny_params() -> dict[str, Any]:
    """The sandbox's params on one file of pairs, with sizes and steps that take a second or two."""
    raw = yaml.safe_load((REPOSITORY / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "messages": "m", "question": "q", "answer": "a", "text": "t"}
    split = {"text": 3, "sft": 2, "reward": 2, "ppo": 2, "judge": 2, "heldout": 1}
    place = {"path": "data/raw/pairs.jsonl", "hub": None, "revision": None, "hub_split": None, "weight": 1}
    raw["data"]["sources"] = [{"name": "mine", "format": "pairs", "columns": columns, "split": split, **place}]
    raw["base"] |= {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    raw["base"] |= {"epochs": 1, "batch_size": 8, "checkpoint_every": 2}
    raw["sft"] |= {"epochs": 1.0, "batch_size": 8, "checkpoint_every": 2, "group_by_length": True}
    raw["sft"]["optimizer"] |= {"learning_rate": 3e-4}
    raw["reward"] |= {"epochs": 1.0, "batch_size": 8, "checkpoint_every": 2, "group_by_length": True}
    raw["evaluate"]["judge"] |= {"epochs": 1.0, "checkpoint_every": 1000}
    raw["evaluate"] |= {"bootstrap_samples": 50, "shown": 2, "texts": 5}
    raw["ppo"] |= {"steps": 4, "rollout_batch_size": 8, "mini_batch_size": 4, "epochs": 2, "max_answer_tokens": 8, "mixture_batch_size": 2}
    raw["ppo"] |= {"critic_warmup_steps": 1, "checkpoint_every": 2, "max_approx_kl": 100.0}
    raw["ppo"]["kl"] |= {"controller": "adaptive", "target": 1.0, "horizon": 100}
    raw["grpo"] |= {name: raw["ppo"][name] for name in ("steps", "rollout_batch_size", "mini_batch_size", "epochs", "max_answer_tokens")}
    raw["grpo"] |= {"answers_per_prompt": 2, "mixture_batch_size": 2, "checkpoint_every": 2, "max_approx_kl": 100.0}
    raw["answers"] |= {"prompts": 8, "heldout_prompts": 6, "answers_per_temperature": 2, "max_answer_tokens": 48, "batch_size": 8}
    for section in (raw["best_of_n"], raw["rrhf"], raw["iterative"]["dpo"]):
        section |= {"batch_size": 4, "checkpoint_every": 2}
    return raw


def set_params(root: Path, raw: dict[str, Any]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


def make_workspace(root: Path, raw: dict[str, Any], pairs: int) -> None:
    """A folder with params and so many raw pairs, in which stage prepare has run."""
    from rlhf import config
    from rlhf.data.sandbox import make_rows
    from rlhf.job import Job, write_lines
    from rlhf.stages import prepare

    set_params(root, raw)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows("pairs", pairs, 1, 0.0)]
    write_lines(root / "data/raw/pairs.jsonl", rows)
    prepare.main(Job("prepare", config.load(root / "params.yaml"), root, root / "runs/prepare", "cpu", 0, 1, 0))
    shutil.copytree(root / "runs/prepare/out", root, dirs_exist_ok=True)


# ---------------------------------------------------------------------------------------------------- in a rank's process


def main(words: Sequence[str]) -> None:
    import torch.distributed as dist

    from rlhf import config
    from rlhf.job import Job

    for word in words:
        place, _, variant = word.partition(":")
        if variant:
            VARIANTS[variant]()
        root, stage = Path.cwd() / Path(place).parent, Path(place).name
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = os.environ["DS_ACCELERATOR"]
        job = Job(stage, config.load(root / "params.yaml"), root, root / "runs" / stage, device, rank, ranks, rank)
        job.folder.mkdir(parents=True, exist_ok=True)
        import_module(f"rlhf.stages.{config.kind(stage)}").main(job)
        if dist.is_initialized():
            dist.barrier()
        if job.is_main:
            shutil.copytree(job.folder / "out", root, dirs_exist_ok=True)
        if dist.is_initialized():
            dist.barrier()


def die_after_the_first_checkpoint() -> None:
    from rlhf.engine import checkpoints

    save = checkpoints.save

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        checkpoints.settle()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save = save_and_die  # type: ignore[assignment]  # it takes whatever it is given


def after_the_first_checkpoint(act: Callable[[Path], None]) -> None:
    from rlhf.engine import checkpoints

    save = checkpoints.save
    done: list[bool] = []

    def save_and_act(job: Any, *arguments: Any) -> None:
        save(job, *arguments)
        if not done:
            checkpoints.settle()
            act(job.root)
        done.append(job)

    checkpoints.save = save_and_act  # type: ignore[assignment]  # it takes whatever it is given


def fill_the_disk(root: Path) -> None:
    with (root / "filler").open("wb") as file:
        file.write(b"0" * (shutil.disk_usage(root).free - 64 * 1024))


def print_where_it_listens(_root: Path) -> None:
    listening = [entry.laddr.ip for entry in psutil.Process().net_connections("inet") if entry.status == psutil.CONN_LISTEN]
    print(f"listens on {sorted(set(listening))}", flush=True)


def pad_instead_of_packing() -> None:
    for module in ("rlhf.stages.language_model", "rlhf.stages.reward", "rlhf.stages.dpo", "rlhf.stages.updates", "rlhf.rollout.experience"):
        import_module(module).pack = padded  # type: ignore[attr-defined]  # which module it is, mypy cannot know


def padded(sequences: Sequence[Sequence[int]], device: Any) -> Packed:
    """What `rlhf.models.packed.pack` gives, with padding up to the longest sequence; none shares its beginning."""
    import torch

    from rlhf.models.packed import Packed, pad_rows
    from rlhf.models.pieces import Piece

    width = max(map(len, sequences))
    lengths = [len(sequence) for sequence in sequences]
    return Packed(
        device=torch.device(device),
        ids=pad_rows(sequences, 0).view(1, -1),
        positions=torch.arange(width).repeat(1, len(sequences)),
        pieces=[Piece(part, None) for length in lengths for part in (length, width - length) if part],
        runs=[[slice(i * width, i * width + length)] for i, length in enumerate(lengths)],
        places=torch.arange(len(sequences) * width).view(-1, width),
        lengths=torch.tensor(lengths),
    )


def misstate_log_probs() -> None:
    from rlhf.stages import answering

    generate = answering.generate

    def generate_and_misstate(*arguments: Any, **options: Any) -> Any:
        rollouts = generate(*arguments, **options)
        return replace(rollouts, log_probs=[[value - 0.01 for value in row] for row in rollouts.log_probs])

    answering.generate = generate_and_misstate


def compare_rollouts_with_the_weights() -> None:
    from rlhf.stages import ppo

    roll_out = ppo.roll_out
    before: list[Any] = []

    def roll_out_and_compare(job: Any, models: Any, *arguments: Any) -> Any:
        rollouts = roll_out(job, models, *arguments)
        weights = plain_weights(models.actor.module, job.params.ppo.actor_lora)
        if job.is_main:
            before.append(weights)
            parts = [log_probs_under(model, models.actor.module, rollouts, job.params.ppo.temperature) for model in before[-2:]]
            stated = [value for row in rollouts.log_probs for value in row]
            off = [max(abs(a - b) for a, b in zip(stated, part, strict=True)) for part in parts]
            print(f"{job.root.name}, version {rollouts.policy_version}: off by {off[-1]:.1e}, from the weights before by {off[0]:.1e}")
        return rollouts

    ppo.roll_out = roll_out_and_compare  # type: ignore[assignment]  # it takes whatever it is given


def plain_weights(module: Any, lora: Any) -> dict[str, Any]:
    """Whole weights by the names of a model without adapters, which are added to them here: W + alpha / rank · B A."""
    from rlhf.engine.partition import whole_weights

    held = whole_weights(module)
    held = {name: weight.clone() for name, weight in (module.state_dict() if held is None else held).items()}
    plain = {name.replace(".base_layer", ""): weight for name, weight in held.items() if "lora_" not in name}
    for name in [name for name in held if ".lora_A." in name]:
        place = name.partition(".lora_A.")[0]
        plain[f"{place}.weight"] += lora.alpha / lora.rank * held[name.replace("lora_A", "lora_B")] @ held[name]
    return plain


def log_probs_under(weights: dict[str, Any], module: Any, rollouts: Any, temperature: float) -> list[float]:
    """Log-probability of each answer token, row by row, from a full forward pass of a model made of the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(module.config).eval()
    model.load_state_dict(weights)
    found: list[float] = []
    with torch.no_grad():
        for prompt, answer in zip(rollouts.prompts, rollouts.answers, strict=True):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found += (logits / temperature).log_softmax(-1)[torch.arange(len(answer)), answer].tolist()
    return found


def say_what_is_partitioned() -> None:
    from rlhf.engine.partition import is_partitioned
    from rlhf.stages import evaluate

    frozen = evaluate.frozen

    def frozen_and_said(module: Any, *arguments: Any) -> Any:
        module = frozen(module, *arguments)
        print("in parts" if is_partitioned(module) else "whole")
        return module

    evaluate.frozen = frozen_and_said  # type: ignore[assignment]  # it is generic


def measure_no_curve() -> None:
    from rlhf.stages import reward

    reward.CURVE_PAIRS = 0


def take_fp16_for_supported() -> None:
    from deepspeed.accelerator import get_accelerator

    from rlhf.engine import speed

    get_accelerator().is_fp16_supported = lambda: True
    speed.MATRIX_WIDTH["cpu"] = 64  # ten seconds otherwise, to know its rate


VARIANTS = {
    "killed": die_after_the_first_checkpoint,
    "filled": lambda: after_the_first_checkpoint(fill_the_disk),
    "watched": lambda: after_the_first_checkpoint(print_where_it_listens),
    "padded": pad_instead_of_packing,
    "off": misstate_log_probs,
    "compared": compare_rollouts_with_the_weights,
    "partitioned": say_what_is_partitioned,
    "unmeasured": measure_no_curve,
    "fp16": take_fp16_for_supported,
}
