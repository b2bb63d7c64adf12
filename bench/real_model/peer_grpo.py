"""TRL's GRPOTrainer in the place of stage grpo: the same weights, prompts in the same order, rewards, number of answers and rates.

It is started as a stage is, in a workspace of its own (bench/real_model/seeds.py --peers), and writes what stage grpo writes, so that stage
evaluate measures both alike. In bf16 by autocast on fp32 weights. Answers are drawn by transformers' `generate`, TRL's default; vLLM, which
it can be given, is faster. What still differs: the answers drawn; TRL deals a step's answers out to its two updates one by one, ours by
prompt; ours stops a step's updates early by max_approx_kl.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from bench.speed.training import SETTINGS
from bench.speed.workload import load_plain
from rlhf.engine.order import Order
from rlhf.engine.setup import learning_rate_factor, parameter_groups
from rlhf.engine.speed import peak_memory
from rlhf.errors import UserError
from rlhf.job import Job, run, write_lines
from rlhf.models.dialogues import decode_answer
from rlhf.models.policy import DTYPES
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.answering import read_prompts
from rlhf.stages.rewarding import Rewards, final_rewards


def main(job: Job) -> None:
    import trl
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    params, tokenizer = job.params.grpo, load_tokenizer(job.input("models/sft"))
    torch.manual_seed(job.params.seed)
    prompts, _ = read_prompts(job, tokenizer)
    check(job, tokenizer, prompts)
    groups = params.rollout_batch_size // params.answers_per_prompt
    wanted = Order(len(prompts), 1, job.seed("order")).following(0, params.steps * groups)
    rewards, records, times = Rewards.of(job), list[dict[str, Any]](), [time.monotonic()]

    def scores(prompts: list[Any], completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float | None]:
        rows, answers = [rows_of[i] for i in number], [decode_answer(tokenizer, ids) for ids in completion_ids]
        found = rewards.checkers.score(rows, answers)
        summed = [rewards.summed({name: outcomes[i] for name, outcomes in found.items()}, ())[0] for i in range(len(rows))]
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        step = len(records) // params.rollout_batch_size + 1
        parts = zip(rows, answers, summed, ended, strict=True)
        records.extend({"step": step, **row, "answer": said, "kl": None, "score": score, "ended": end} for row, said, score, end in parts)
        times.append(time.monotonic())
        given: list[float] = final_rewards(torch.tensor(summed), torch.tensor(ended), params).tolist()
        cost = {"seconds": times[-1] - times[-2]}
        job.log(step, params.steps, {"reward": statistics.fmean(given), "eos_rate": statistics.fmean(ended), **cost})
        return [*given]

    rows_of = {i: prompts[i]["row"] for i in wanted}
    policy = load_plain(job.input("models/sft"), "fp32")
    updates = params.steps * params.updates_per_step
    given: dict[str, Any] = {"lr": params.actor.learning_rate, "betas": params.actor.betas, "eps": params.actor.epsilon}
    optimizer = torch.optim.AdamW(parameter_groups(policy, params.actor.weight_decay), **given, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(params.actor, step, updates))
    trl.GRPOTrainer(
        policy,
        scores,
        trl.GRPOConfig(str(job.folder / "trl"), **settings(job)),
        Dataset.from_list([{"prompt": prompts[i]["row"]["prompt"], "number": i} for i in wanted]),
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    ).train()
    rewards.checkers.close()
    policy.to(DTYPES[job.params.launch.precision])  # type: ignore[arg-type]  # transformers' type of it is another function's
    policy.save_pretrained(job.output("models/grpo"))
    tokenizer.save_pretrained(job.output("models/grpo"))
    write_lines(job.output("data/rollouts.jsonl"), records)
    job.write_metrics({"answers": len(records), "seconds": times[-1] - times[0], "peak_memory_gib": peak_memory(policy.device)})


def check(job: Job, tokenizer: Any, prompts: list[dict[str, Any]]) -> None:
    """Check that TRL computes what stage grpo does: of the many forms of its loss, this one is passed on, and it tokenizes by itself."""
    params = job.params.grpo
    form = {name: getattr(params, name) for name in ("objective", "ratio", "baseline", "scale", "normaliser", "gamma", "top_k", "top_p")}
    form |= {"entropy": params.entropy_coefficient, "mixture": params.mixture_coefficient, "dual_clip": params.dual_clip}
    form |= {"kl": (params.kl.where, params.kl.estimator)}
    known = {"objective": "clip", "ratio": "token", "baseline": "mean", "scale": "group", "normaliser": "answers", "gamma": 1.0, "top_k": 0}
    known |= {"top_p": 1.0, "entropy": 0.0, "mixture": 0.0, "dual_clip": None, "kl": ("loss", "k3")}
    if other := [name for name in known if form[name] != known[name]]:
        raise UserError(f"section grpo: TRL's side is not told of {', '.join(other)}", remedy="leave these as the presets have them")
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt["row"]["prompt"], add_generation_prompt=True, return_dict=False)
        assert list(ids) == prompt["ids"], "TRL reads the prompts as other tokens"


def settings(job: Job) -> dict[str, Any]:
    """TRL's names for the values of section grpo."""
    params = job.params.grpo
    return SETTINGS | {
        "use_cpu": job.device == "cpu",
        "seed": job.params.seed,
        "bf16": job.params.launch.precision == "bf16",
        "per_device_train_batch_size": params.mini_batch_size,
        "steps_per_generation": params.updates_per_step,
        "num_generations": params.answers_per_prompt,
        "max_completion_length": params.max_answer_tokens,
        "temperature": params.temperature,
        "max_steps": params.steps * params.updates_per_step,
        "beta": params.kl.coefficient,
        "use_bias_correction_kl": params.kl.with_ratio,
        "epsilon": params.policy_clip[0],
        "epsilon_high": params.policy_clip[1],
        "max_grad_norm": params.actor.max_grad_norm,
        "shuffle_dataset": False,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "generation_kwargs": {"use_cache": True},  # the loaded model is set to do without
    }


if __name__ == "__main__":
    run("grpo", main)
