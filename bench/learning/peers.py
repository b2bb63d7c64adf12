"""The sandbox's policy trained by stage grpo and by TRL's trainers, in turn: the gold score of both, and samples per second.

python bench/learning/peers.py --clones DIR            GRPO and RLOO with seeds 1 to 3, on what bench/learning/algorithms.py left
python bench/learning/peers.py --clones DIR rloo --seeds 1 --output one.json
python bench/learning/peers.py --clones DIR --same-answers   TRL's trainers are given our answers: what is left is the training alone
python bench/learning/peers.py --stored one.json --stored other.json   the table of earlier runs, and the intervals over all of them

Both sides begin with stage sft's weights, and have the same prompts in the same order, stage reward's model as reward (an answer that
does not end gets no_eos_reward), number of answers, learning rates and optimiser, and one thread. Each is a process of its own
(bench/speed/sides.py), and they make their steps in turn. The mixture of texts and early stopping, which TRL does not have, are off. What
still differs: the answers drawn; TRL deals a step's answers out to its two updates one by one, ours by prompt; where nothing else needs
them, TRL does not compute the log-probabilities of the policy that sampled. Gold is that of one answer to each held-out prompt, drawn by
our engine with the same seeds; its interval is over prompts, and knows nothing of the luck of a training run, which that over runs does.
With --same-answers, each of TRL's steps has the answers of ours, dealt out to the updates as ours are: the two policies then end within
rounding of each other, or something differs that is not named here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from bench.clone import REPOSITORY, cell, machine
from bench.learning.seeds import numbers_of
from bench.learning.warm_start import interval
from bench.speed.report import Case, case, versions
from bench.speed.sides import Pause, Side, free_port, paced_job, place_of
from bench.speed.training import SETTINGS, Pausing
from bench.speed.workload import NEVER, job_in, last_values, load_plain
from rlhf.engine.distributed import start
from rlhf.engine.order import Order
from rlhf.engine.setup import learning_rate_factor, parameter_groups
from rlhf.job import Job, read_lines
from rlhf.models.dialogues import decode_answer, encode_prompt
from rlhf.models.policy import load_policy
from rlhf.models.scalar import ScalarModel
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages import evaluate, grpo, stored
from rlhf.stages.answering import closed, read_prompts
from rlhf.stages.rewarding import final_rewards
from rlhf.stages.updates import deal
from rlhf.workspace import presets

ALGORITHMS = ("grpo", "rloo")
THEIRS = "models/theirs"

Row = dict[str, Any]


def workspace(clone: Path, place: Path, algorithm: str, seed: int) -> Path:
    """A folder with the models and data of a clone, and the params of an algorithm without what TRL lacks."""
    root = place / f"{algorithm}-{seed}"
    for folder in ("models/sft", "models/reward", "data/prepared", "presets", "graphs"):
        shutil.copytree(clone / folder, root / folder)
    without = ("grpo.mixture_coefficient=0", f"grpo.max_approx_kl={NEVER}", f"grpo.checkpoint_every={NEVER}")
    presets.use(root, "sandbox", [f"seed={seed}", f"algorithm={algorithm}", *without])
    return root


# ----------------------------------------------------------------------------------------------------------------- sides


def ours(pause: Pause, root: Path) -> None:
    grpo.main(paced_job(pause, root, "grpo"))
    pause()  # the model is there


def theirs(pause: Pause, root: Path, algorithm: str, same_answers: bool) -> None:
    import trl
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    job = job_in(root, "grpo")
    params, tokenizer = job.params.grpo, load_tokenizer(job.input("models/sft"))
    torch.manual_seed(job.params.seed)
    prompts, _ = read_prompts(job, tokenizer)
    groups = params.rollout_batch_size // params.answers_per_prompt
    wanted = Order(len(prompts), 1, job.seed("order")).following(0, params.steps * groups)
    reward = ScalarModel(load_plain(job.input("models/reward"), "fp32", AutoModelForSequenceClassification)).eval()
    policy = load_plain(job.input("models/sft"), "fp32")

    def scores(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in completion_ids])
        said = zip(prompts, completion_ids, closed(ended.tolist(), tokenizer), strict=True)
        rows = [encode_prompt(tokenizer, prompt) + answer + closing for prompt, answer, closing in said]
        found = (last_values(reward, rows, tokenizer.pad_token_id) - reward.mean) / reward.std
        return final_rewards(found, ended, params).tolist()

    updates = params.steps * params.updates_per_step
    settings: dict[str, Any] = SETTINGS | {
        "seed": job.params.seed,
        "bf16": False,
        "per_device_train_batch_size": params.mini_batch_size,
        "steps_per_generation": params.updates_per_step,
        "num_generations": params.answers_per_prompt,
        "max_completion_length": params.max_answer_tokens,
        "temperature": params.temperature,
        "max_steps": updates,
        "beta": params.kl.coefficient,
        "epsilon": params.policy_clip[0],
        "max_grad_norm": params.actor.max_grad_norm,
        "shuffle_dataset": False,
        "generation_kwargs": {"use_cache": True},  # the loaded model is set to do without
    }
    config: Any
    trainer: Any
    config, trainer = (trl.RLOOConfig, trl.RLOOTrainer) if algorithm == "rloo" else (trl.GRPOConfig, trl.GRPOTrainer)
    own: dict[str, Any] = {}
    if algorithm == "grpo":
        own = {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": params.kl.with_ratio}
    given: dict[str, Any] = {"lr": params.actor.learning_rate, "betas": params.actor.betas, "eps": params.actor.epsilon}
    trainer = replaying(trainer, job) if same_answers else trainer
    optimizer = torch.optim.AdamW(parameter_groups(policy, params.actor.weight_decay), **given, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(params.actor, step, updates))
    trainer(
        policy,
        scores,
        config(str(root / "trl"), **settings, **own),
        Dataset.from_list([{"prompt": prompts[i]["row"]["prompt"]} for i in wanted]),
        processing_class=tokenizer,
        callbacks=[Pausing(pause, params.updates_per_step)],
        optimizers=(optimizer, schedule),
    ).train()
    policy.save_pretrained(root / THEIRS)
    pause()


def replaying(trainer: type[Any], job: Job) -> type[Any]:
    """A trainer whose steps have the answers of our step before, dealt out as there."""
    params, steps = job.params.grpo, 0

    class Replaying(trainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
            nonlocal steps
            kept = torch.load(job.folder / stored.FILE, weights_only=True)
            rows = [(prompt["ids"], ids) for prompt in kept["prompts"] for ids, *_ in prompt["answers"]]
            assert kept["step"] == (steps := steps + 1), "ours goes first"
            assert [list(ids) for ids in prompt_ids] == [ids for ids, _ in rows], "TRL reads the prompts as other tokens"
            answers = [ids for _, ids in rows]
            return answers if "RLOO" in trainer.__name__ else (answers, None)

    def dealt(batch: dict[str, Any]) -> dict[str, Any]:
        order = torch.tensor(deal(job, params.rollout_batch_size, steps - 1, params.answers_per_prompt)).flatten()
        return {name: value[order] if isinstance(value, torch.Tensor) and value.ndim else value for name, value in batch.items()}

    sys.modules[trainer.__module__].shuffle_sequence_dict = dealt  # type: ignore[attr-defined]  # in this process alone
    return Replaying


def trained(root: Path, algorithm: str, seed: int, same_answers: bool) -> Case:
    """Let both sides train to their end, in turn; what their steps cost."""
    params = job_in(root, "grpo").params.grpo
    with Side(ours, root, ranks=1) as one, Side(theirs, root, algorithm, same_answers) as other:
        costs = [(one.step(), other.step()) for _ in range(params.steps + 1)][1:]  # the first is to get ready
        one.step(), other.step()  # they write their models
    said = f"{params.rollout_batch_size} answers a step, {params.answers_per_prompt} to a prompt"
    return case(f"{algorithm}, seed {seed}", [params.rollout_batch_size] * params.steps, costs, "samples/s", said)


# ------------------------------------------------------------------------------------------------------------------ gold


def gold(root: Path) -> dict[str, Any]:
    """The mean gold score of sft and of both sides on the held-out prompts, and how far ours is above TRL's, with 95% intervals."""
    job = job_in(root, "evaluate")
    tokenizer = load_tokenizer(job.input("models/sft"))
    prompts = read_lines(job.input("data/prepared/heldout_prompts.jsonl"))[: job.params.evaluate.prompts]
    scores: dict[str, np.ndarray] = {}
    for name, folder in folders(root).items():
        answers = evaluate.answer(job, load_policy(folder, "fp32").eval(), tokenizer, prompts).answers
        scores[name] = np.array(evaluate.gold_scores(prompts, [decode_answer(tokenizer, ids) for ids in answers]))
    difference = scores["ours"] - scores["trl"]
    means = {name: float(values.mean()) for name, values in scores.items()}
    intervals = {f"ci95_{name}": evaluate.bootstrap(job, scores[name]) for name in ("ours", "trl")}
    return {**means, **intervals, "difference": float(difference.mean()), "ci95": evaluate.bootstrap(job, difference)}


def folders(root: Path) -> dict[str, Path]:
    return {"sft": root / "models/sft", "ours": root / "runs/grpo/out/models/grpo", "trl": root / THEIRS}


def apart(root: Path) -> float:
    """How far our weights are from TRL's, as a share of how far they are from stage sft's."""
    models = {name: load_policy(folder, "fp32").state_dict() for name, folder in folders(root).items()}
    way, between = (
        math.hypot(*(torch.dist(value, models[other][name]).item() for name, value in models["ours"].items())) for other in ("sft", "trl")
    )
    return between / way


def table(rows: list[Row]) -> Table:
    drawn = Table(title="Stage grpo and TRL's trainers, from the same weights", title_justify="left")
    headings = ("", "gold sft", "ours", "95%", "TRL's", "95%", "difference", "95%", "samples/s", "TRL's", "ratio", "of processor time")
    for heading in headings:
        drawn.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        found, speed = row["gold"], row["speed"]
        bounds = [" … ".join(map(cell, found[name])) for name in ("ci95_ours", "ci95_trl", "ci95")]
        golds = (found["sft"], found["ours"], bounds[0], found["trl"], bounds[1], found["difference"], bounds[2])
        drawn.add_row(speed["name"], *map(cell, (*golds, speed["ours"], speed["peer"], speed["ratio"], speed["processor_ratio"])))
    return drawn


def over_runs(rows: Sequence[Row]) -> list[str]:
    """How far gold is above TRL's, of each algorithm and of all: the mean over seeds, with its 95% interval.

    Runs of one seed began with the same models, and count as one.
    """
    said = []
    for name in (*dict.fromkeys(row["algorithm"] for row in rows), "all"):
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            if name in (row["algorithm"], "all"):
                by_seed.setdefault(row["seed"], []).append(row["gold"]["difference"])
        mean, low, high = interval([statistics.fmean(found) for found in by_seed.values()])
        said.append(f"{name}: gold {mean:+.3f} above TRL's ({low:+.3f} … {high:+.3f} over {len(by_seed)} seeds)")
    return said


def measured(clones: Path, wanted: Sequence[tuple[int, str]], same_answers: bool) -> list[Row]:
    """Train with each seed by each algorithm, both sides, and measure; a line is told of each."""
    rows: list[Row] = []
    with ExitStack() as afterwards:
        place = Path(tempfile.mkdtemp(prefix="rlhf-peers-"))
        afterwards.callback(shutil.rmtree, place, ignore_errors=True)
        for seed, name in wanted:
            root = workspace(clones / str(seed) / "clone", place, name, seed)
            speed = trained(root, name, seed, same_answers)
            if not rows:  # not before, as TRL would take it for its own group
                os.environ |= place_of(0, 1, free_port())
                start(job_in(root, "evaluate"))
            rows.append({"algorithm": name, "seed": seed, "gold": gold(root), "speed": speed, "apart": apart(root)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main(
    algorithms: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ALGORITHMS)}; both where none is named.")] = None,
    clones: Annotated[
        Path | None, typer.Option(help="What `bench/learning/algorithms.py --clones DIR` left; without it nothing is trained.")
    ] = None,
    same_answers: Annotated[bool, typer.Option("--same-answers", help="Give TRL's trainers our answers.")] = False,
    earlier: Annotated[list[Path] | None, typer.Option("--stored", help="What an earlier run wrote: its numbers count as well.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them, or a range: 1,2,5-7.")] = "1-3",
    output: Annotated[Path, typer.Option(help="Where to write the numbers.")] = REPOSITORY / "bench" / "peers.json",
) -> None:
    """Train by both, and print gold scores and speeds."""
    names = algorithms or list(ALGORITHMS)
    if unknown := set(names) - set(ALGORITHMS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: TRL has {' and '.join(ALGORITHMS)}")
    if not (clones or earlier):
        raise typer.BadParameter("give --clones DIR to train, or --stored FILE to print what was measured")
    rows: list[Row] = [row for path in earlier or [] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    if clones:
        rows += measured(clones, [(seed, name) for seed in numbers_of(seeds) for name in names], same_answers)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(rows))
    console.print("\n".join(over_runs(rows)))
    for row in rows if same_answers else []:
        console.print(f"{row['speed']['name']}: TRL's weights are off by {row['apart']:.1e} of the way from sft's to ours")
    output.write_text(json.dumps({"machine": machine(), "versions": versions(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
