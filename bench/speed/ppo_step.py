"""A whole PPO step, in samples per second: stage ppo against a loop that computes as DeepSpeed-Chat does, that code itself, and TRL's RLOO.

python bench/speed/ppo_step.py                         answers of up to 64 tokens and of up to 256
python bench/speed/ppo_step.py --quick                 up to 64 tokens, fewer rounds
python bench/speed/ppo_step.py --check                 no speeds: do both sides compute the same, on tiny models?
python bench/speed/ppo_step.py --chat FOLDER           against DeepSpeed-Chat's own code as well (deepspeed_chat.py)
python bench/speed/ppo_step.py --pairs pairs.jsonl.gz  prompts of a file of Anthropic-style pairs instead of the sandbox's

Each side is a process of its own (sides.py) with the same weights, prompts, learning rates and number of updates; they make their
steps in turn. Answer lengths are laid down beforehand, each prompt's its own (`planned_lengths`, workload.py), and each side obeys
by its own means. Ours is `main` of rlhf/stages/ppo.py, with its checks, records and log. RLOO has neither critic nor values: it does less.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import AutoModelForSequenceClassification, LogitsProcessorList

from bench.speed import deepspeed_chat
from bench.speed import reference_ppo as reference
from bench.speed.ends import EndsAsPlanned
from bench.speed.report import Case, case, collect, console, table, write
from bench.speed.sides import Pause, Side, free_port, paced_job, place_of
from bench.speed.workload import (
    CONTEXT,
    LONGEST,
    NEVER,
    OPTIMIZER,
    TINY,
    Workspace,
    job_in,
    jobs,
    last_values,
    load_plain,
    planned_lengths,
    workspace,
)
from rlhf.engine.distributed import start
from rlhf.engine.order import Order
from rlhf.engine.speed import Clock
from rlhf.job import Job, read_lines
from rlhf.models.dialogues import encode_prompt
from rlhf.models.packed import pad_rows
from rlhf.models.scalar import ScalarModel
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.experience import Experience
from rlhf.rollout.generate import Rollouts, generate
from rlhf.stages import answering, ppo
from rlhf.stages.answering import read_prompts
from rlhf.stages.updates import deal, mini_batches

NO_TOKEN = -1
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Plan:
    """Work of a step."""

    answers: int
    limit: int  # tokens of the longest answer
    kind: str = "varied"  # of `planned_lengths`
    each: int = 1  # answers to a prompt
    system: int = 0  # tokens of the system prompt before each
    updates: int = 2
    precision: str = "fp32"
    critic: dict[str, Any] | None = None  # sizes of critic and reward model; None: those of the policy
    shortest: int = 1  # tokens of the shortest answer

    def params(self, steps: int, **layout: int) -> dict[str, dict[str, Any]]:
        """What stage ppo is set to: no mixture text, never stopped early. `layout` is of `jobs`."""
        values = {
            "steps": steps,
            "rollout_batch_size": self.answers,
            "mini_batch_size": self.answers // self.updates,
            "max_prompt_tokens": LONGEST + 2 * self.system,
            "max_answer_tokens": self.limit,
            "mixture_coefficient": 0.0,
            "critic_warmup_steps": 0,
            "max_approx_kl": NEVER,
            "stop": {"kl": NEVER, "score": NEVER},
            "actor": OPTIMIZER,
            "critic": OPTIMIZER,
            "checkpoint_every": NEVER,
        }
        return {"ppo": values, "launch": {"jobs": jobs(**layout)}}

    def lengths(self, prompts: list[list[int]]) -> dict[tuple[int, ...], int]:
        """Tokens of the answers to each prompt."""
        distinct = sorted(set(map(tuple, prompts)))
        planned = (max(self.shortest, length) for length in planned_lengths(len(distinct), self.limit, self.kind))
        return dict(zip(distinct, planned, strict=True))


QUICK_LIMIT = 64
# of 4.3 million weights beside an actor of 12.4: as its own defaults have a smaller critic
CHAT_CRITIC = {"hidden_size": 256, "word_embed_proj_dim": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 1024}
ROUNDS = 7


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Answers of up to 64 tokens only, two rounds.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Print how far apart both sides' numbers are.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with `chosen` and `rejected` dialogues; may end in .gz.")] = None,
    chat: Annotated[
        Path | None, typer.Option(help="The folder applications/DeepSpeed-Chat of a checkout: its cases are run as well.")
    ] = None,
    only: Annotated[str, typer.Option(help="A part of the names of the cases wanted.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds; the median of their ratios counts.")] = ROUNDS,
    threads: Annotated[int, typer.Option(help="Threads of either side.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Where to write the numbers.")] = None,
) -> None:
    """Print samples per second of both sides, and the median of the rounds' ratios."""
    if check:
        apart = {family: differences(family) for family in TINY}
        console().print(drawn(apart))
        raise typer.Exit(int(max(value for row in apart.values() for value in row.values()) > TOLERANCE))
    found = collect(cases(pairs, 2 if quick else rounds, threads, only, quick=quick, chat=chat))
    console().print(table(found))
    if output:
        write(output, found)


def cases(
    pairs: Path | None, rounds: int, threads: int, only: str = "", *, quick: bool = False, chat: Path | None = None
) -> Iterator[Case]:
    """Against the reference loop, DeepSpeed-Chat where it is there, and RLOO."""
    for family, plan, peer in WORK:
        work = f"{plan.precision}, up to {plan.limit}, {plan.kind}{', system prompt' if plan.system else ''}"
        name = f"ppo step, {family}, {work}, against {peer.__name__.replace('_', ' ')}"
        if only in name and not (quick and plan.limit > QUICK_LIMIT) and (chat or peer is not deepspeed_chat_itself):
            yield measured(name, family, plan, peer, pairs, rounds, threads, chat)


def measured(
    name: str, family: str, plan: Plan, peer: Callable[..., None], pairs: Path | None, rounds: int, threads: int, chat: Path | None
) -> Case:
    rows = plan.answers // plan.each
    given = [chat.resolve()] if chat and peer is deepspeed_chat_itself else []
    with (
        workspace(
            family,
            pairs,
            rows,
            CONTEXT,
            plan.params(rounds),
            times=plan.each,
            system=plan.system,
            precision=plan.precision,
            critic=plan.critic,
        ) as place,
        Side(planned_stage, place.root, plan, threads=threads, ranks=1) as ours,
        Side(peer, place.root, plan, *given, threads=threads, ranks=1) as theirs,
    ):
        costs = [(ours.step(), theirs.step()) for _ in range(rounds + 1)][1:]  # the first is to get ready
        return case(name, [plan.answers] * rounds, costs, "samples/s", described(place, plan, threads))


def described(place: Workspace, plan: Plan, threads: int) -> str:
    prompts = asked(place.job("ppo"))
    asks, answers = statistics.fmean(map(len, prompts)), statistics.fmean(plan.lengths(prompts).values())
    size = f"{place.parameters / 1e6:.1f} million weights, {'critic 4.3' if plan.critic else 'critic as well'}"
    return (
        f"{size}, {plan.precision}, {threads} threads, {plan.updates} updates, {plan.answers} answers of {answers:.0f} tokens on average "
        f"to prompts of {asks:.0f}"
    )


def asked(job: Job) -> list[list[int]]:
    return [row["ids"] for row in read_prompts(job, load_tokenizer(job.input("models/sft")))[0]]


# ----------------------------------------------------------------------------------------------------------------- sides


def planned_stage(pause: Pause, root: Path, plan: Plan) -> None:
    job = paced_job(pause, root, "ppo")
    obey(plan, job)
    ppo.main(job)


def obey(plan: Plan, job: Job) -> None:
    """Have stage ppo's answers stop where they are planned to, in this process."""
    lengths = plan.lengths(asked(job))

    def planned(model: Any, prompts: list[list[int]], *arguments: Any, **options: Any) -> Rollouts:
        ends = [lengths[tuple(prompt)] for prompt in prompts]
        return generate(model, prompts, *arguments, **options | {"eos_id": NO_TOKEN, "stop": lambda i, answer: len(answer) == ends[i]})

    answering.generate = planned  # type: ignore[assignment]  # arguments pass through it as they come


def reference_loop(pause: Pause, root: Path, plan: Plan) -> None:
    job = job_in(root, "ppo")
    torch.manual_seed(1)
    params, prompts = job.params.ppo, asked(job)
    lengths, models = plan.lengths(prompts), reference.load(job, load_tokenizer(job.input("models/sft")))
    order = Order(len(prompts), params.rollout_batch_size, job.seed("order"))
    pause()
    for step in range(params.steps):
        rows = [prompts[i] for i in order.batch(step)]
        ends = [lengths[tuple(row)] for row in rows]
        answers = reference.generate(models.actor, rows, ends, models.pad_id)
        batch = reference.Batch.of(rows, answers, ends, models.pad_id)
        experience = reference.experience(models, batch, params, params.kl.coefficient)
        reference.update(models, batch, experience, deal(job, len(rows), step), params)
        pause()


def deepspeed_chat_itself(pause: Pause, root: Path, plan: Plan, checkout: Path) -> None:
    prompts = asked(job_in(root, "ppo"))
    deepspeed_chat.side(pause, root, plan, prompts, plan.lengths(prompts), checkout)


def rloo(pause: Pause, root: Path, plan: Plan) -> None:
    """TRL's RLOO trainer: no critic, and each prompt answered `plan.each` times."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from bench.speed.training import SETTINGS, Pausing

    job = job_in(root, "ppo")
    tokenizer = load_tokenizer(job.input("models/sft"))
    lengths = plan.lengths(asked(job))
    texts = [row["prompt"] for row in read_lines(job.input("data/prepared/ppo.jsonl"))][:: plan.each]
    ids = {str(text): encode_prompt(tokenizer, text) for text in texts}
    policy = load_plain(job.input("models/sft"), "fp32")
    reward = ScalarModel(load_plain(job.input("models/reward"), "fp32", AutoModelForSequenceClassification)).eval()
    sample: Any = policy.generate

    def planned(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        ends = input_ids.shape[1] + torch.tensor([lengths[row] for row in rows])
        processors = LogitsProcessorList([EndsAsPlanned(ends, tokenizer.eos_token_id)])
        return sample(input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors, **options)

    def scores(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        rows = [ids[str(prompt)] + answer for prompt, answer in zip(prompts, completion_ids, strict=True)]
        return last_values(reward, rows, tokenizer.pad_token_id).tolist()

    setattr(policy, "generate", planned)  # noqa: B010  # a module takes it, its type does not
    settings = RLOOConfig(
        str(root / "rloo"),
        **SETTINGS,
        bf16=False,
        per_device_train_batch_size=plan.answers // plan.updates,
        steps_per_generation=plan.updates,
        num_generations=plan.each,
        max_completion_length=plan.limit,
        max_steps=job.params.ppo.steps * plan.updates,
        beta=job.params.ppo.kl.coefficient,
        generation_kwargs={"use_cache": True},  # the loaded model is set to do without
    )
    data = Dataset.from_list([{"prompt": text} for text in texts])
    trainer = RLOOTrainer(policy, scores, settings, data, processing_class=tokenizer, callbacks=[Pausing(pause, plan.updates)])
    trainer.train()


WORK: tuple[tuple[str, Plan, Callable[..., None]], ...] = (
    *(
        (family, Plan(answers, limit, precision=precision), reference_loop)
        for precision in ("fp32", "bf16")
        for family in ("opt", "llama")
        for answers, limit in ((32, 64), (16, 256))
    ),
    *(
        ("opt", Plan(16, 64, kind, updates=1, precision="bf16", critic=CHAT_CRITIC, shortest=3), deepspeed_chat_itself)
        for kind in ("full", "varied")
    ),
    ("llama", Plan(32, 64, system=128), reference_loop),
    ("llama", Plan(32, 64, each=2), rloo),
)


# ----------------------------------------------------------------------------------------------------------------- check


def differences(family: str) -> dict[str, float]:
    """The largest ones between both sides, on the same weights and answers: what they score, their losses, their weights after a step."""
    plan = Plan(8, 16)
    params = plan.params(1, tokens=100)
    params["ppo"] |= {name: {**OPTIMIZER, "learning_rate": 1e-3} for name in ("actor", "critic")}  # a wrong step shows
    with workspace(family, None, plan.answers, CONTEXT, params, **TINY[family]) as place:
        return _differences(place, plan)


def _differences(place: Workspace, plan: Plan) -> dict[str, float]:
    job = place.job("ppo")
    os.environ |= place_of(0, 1, free_port())
    device, params, beta = start(job), job.params.ppo, job.params.ppo.kl.coefficient
    prompts = asked(job)
    obey(plan, job)
    (ours, critic), theirs = ppo.load_models(job, place.tokenizer, device), reference.load(job, place.tokenizer)
    rollouts = answering.roll_out(job, ours, prompts, ppo.answer_seeds(job, 0, len(prompts)), 0, Clock(device))
    e = Experience.of(ppo.score(job, ours, critic, [], rollouts), device)
    targets, _ = ppo.advantages(e, params, beta)
    batch = reference.Batch.of(prompts, pad_rows(rollouts.answers, theirs.pad_id), rollouts.lengths, theirs.pad_id)
    known = reference.experience(theirs, batch, params, beta)
    stats = ppo.update(job, ours, critic, e, targets, mini_batches(job, e, [], None, 0), 0)
    losses = reference.update(theirs, batch, known, deal(job, len(prompts), 0), params)
    tensors = {
        "log-probabilities": (e.log_probs, known.log_probs),
        "reference's": (e.reference_log_probs, known.reference_log_probs),
        "values": (e.values, known.values),
        "scores": (e.scores, known.scores),
        "advantages": (targets.advantages, known.advantages),
        "returns": (targets.returns, known.returns),
        "actor": _weights(ours.actor.module, theirs.actor),
        "critic": _weights(critic.module, theirs.critic),
    }
    found = {name: (one - other).abs().max().item() for name, (one, other) in tensors.items()}
    return found | {name: abs(stats[name] - loss) for name, loss in losses.items()}


def _weights(*models: torch.nn.Module) -> list[torch.Tensor]:
    return [torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) for model in models]


def drawn(found: dict[str, dict[str, float]]) -> Table:
    shown = Table(title="Largest differences between stage and reference loop", title_justify="left")
    for heading in ("", *found):
        shown.add_column(heading, justify="left" if not heading else "right")
    for name in next(iter(found.values())):
        shown.add_row(name, *(f"{row[name]:.1e}" for row in found.values()))
    return shown


if __name__ == "__main__":
    typer.run(main)
