"""Critic-free losses against TRL's own trainers: two updates of a real step of each, on the same tiny models.

TRL samples, scores by a function of the token ids, and takes two updates on what it sampled. Its loss, the gradient, and the weights at
that moment are kept, and both are computed again here from token ids and rewards alone. What is known to differ:

    bnpo, grpo, dr_grpo   TRL divides by the micro-batch at hand; here one micro-batch is the batch
    dapo, cispo           TRL divides by the tokens of the whole generation; here that is one mini-batch
    beta with GSPO        TRL multiplies the KL by the answer's ratio, and this by the token's: with_ratio is compared on tokens alone
    cispo                 TRL has an upper cap alone: 0 is the lower one here
    delta                 TRL's two-sided clipping is the dual clip, where it lies above the upper clip
    RLOO                  its loss is a mean over the answers of a micro-batch
"""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.algorithms.advantages import advantages
from rlhf.algorithms.group import Objective, group_loss, token_weights
from rlhf.models.attention import attend_to_pieces
from rlhf.rollout.experience import Layout
from rlhf.stages.answering import answer_log_probs
from rlhf.tensors import mask_from_lengths
from tests.algorithms.test_oracles import QUIET, ROWS, gradient, near, policy

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[dev]'")

EACH, LIMIT, TEMPERATURE, BETA, LOW, HIGH = 4, 9, 0.9, 0.3, 0.1, 0.15


@dataclass
class Step:
    """One update of TRL's."""

    model: LlamaForCausalLM  # as it was before it
    loss: Tensor
    gradient: Tensor


@dataclass
class Run:
    steps: list[Step]
    sequences: list[list[int]]
    prompt_lengths: list[int]
    mask: Tensor  # (B, A)
    rewards: Tensor  # (G, k)
    advantages: Tensor  # (B,)
    reference: LlamaForCausalLM


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Of token ids, so that answers to a prompt differ."""
    return [sum(ids) % 11 / 4 - len(ids) / 8 for ids in completion_ids]


def trained(kind: str, tokenizer: PreTrainedTokenizerFast, folder: Path, **changes: Any) -> Run:
    """Let one of TRL's trainers sample, and take two updates."""
    from datasets import Dataset

    model, reference = policy(tokenizer, 1), policy(tokenizer, 2)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3  # so that some answers end early
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sizes: dict[str, Any] = {"num_generations": EACH, "max_completion_length": LIMIT, "num_iterations": 2, "max_steps": 2}
    optimizer: dict[str, Any] = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "save_strategy": "no", "max_grad_norm": 1e9}
    config, trainer = (trl.GRPOConfig, trl.GRPOTrainer) if kind == "grpo" else (trl.RLOOConfig, trl.RLOOTrainer)
    batch = {"per_device_train_batch_size": 2 * EACH, "temperature": TEMPERATURE, "epsilon": LOW, "epsilon_high": HIGH}
    settings = config(str(folder), **{**QUIET, **sizes, **optimizer, **batch, **changes})
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    made = trainer(str(folder / "model"), reward, args=settings, train_dataset=prompts, processing_class=tokenizer)
    if made.ref_model is not None:
        made.ref_model.load_state_dict(reference.state_dict())
    steps: list[Step] = []
    seen: list[dict[str, Any]] = []
    compute = made._compute_loss

    def compute_and_keep(module: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute(module, inputs)
        slopes = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        held = copy.deepcopy(made.accelerator.unwrap_model(module))
        steps.append(Step(held, loss.detach(), torch.cat([slope.flatten() for slope in slopes])))
        seen.append(inputs)
        return loss

    made._compute_loss = compute_and_keep
    with pytest.MonkeyPatch.context() as patch:  # it would shuffle answers before it deals them to mini-batches, of which there is one
        patch.setattr(sys.modules[trainer.__module__], "shuffle_sequence_dict", lambda batch: batch)
        made.train()
    kept = seen[0]
    assert torch.equal(kept["completion_ids"], seen[1]["completion_ids"])
    lengths = kept["completion_mask"].sum(1)
    assert lengths.min() < lengths.max()
    asked = [ids[mask.bool()].tolist() for ids, mask in zip(kept["prompt_ids"], kept["prompt_mask"], strict=True)]
    answers = [ids[mask.bool()].tolist() for ids, mask in zip(kept["completion_ids"], kept["completion_mask"], strict=True)]
    for step in steps:
        attend_to_pieces(step.model)
    return Run(
        steps=steps,
        sequences=[prompt + answer for prompt, answer in zip(asked, answers, strict=True)],
        prompt_lengths=[len(prompt) for prompt in asked],
        mask=mask_from_lengths(lengths, int(lengths.max())),
        rewards=torch.tensor(reward(answers)).view(-1, EACH),
        advantages=kept["advantages"],
        reference=reference,
    )


def compare(run: Run, form: Objective, normaliser: str, values: dict[str, Any]) -> None:
    """Compute both updates from token ids and rewards, and hold advantages, losses and gradients against TRL's."""
    at = Layout.of(run.sequences, run.prompt_lengths, run.mask.shape[1], torch.device("cpu"))
    with torch.no_grad():
        old = answer_log_probs(run.steps[0].model, at, TEMPERATURE)
        reference = answer_log_probs(run.reference, at, TEMPERATURE)
    found = advantages(run.rewards, run.rewards[:, 0], old - reference, run.mask, gamma=1.0, **values)
    near(found[:, 0], run.advantages)
    weights = token_weights(run.mask, normaliser, run.mask.sum().item(), len(run.mask), LIMIT)
    for step in run.steps:
        now = answer_log_probs(step.model, at, TEMPERATURE)
        ours = group_loss(now, old, reference, found, run.mask, weights, torch.ones_like(run.mask), form)
        near(ours.loss, step.loss)
        size = step.gradient.norm()
        near(gradient(step.model, ours.loss) / size, step.gradient / size)
    clipped = (ours.sums["clip_fraction"] / run.mask.sum()).item()
    assert 0.05 < clipped < 1, "the second update is to see other ratios than 1"


def form_of(**changes: Any) -> Objective:
    values: dict[str, Any] = {"ratio": "token", "objective": "clip", "policy_clip": (LOW, HIGH), "dual_clip": None}
    values |= {"ratio_cap": (0.0, 1.05), "kl_coefficient": BETA, "kl_estimator": "k3", "kl_with_ratio": False}
    return Objective(**(values | changes))


GROUP = {"baseline": "mean", "scale": "group", "epsilon": 1e-4, "kl_where": "loss", "beta": BETA}


@pytest.mark.parametrize(
    ("given", "normaliser", "ours"),
    [
        ({"loss_type": "grpo", "use_bias_correction_kl": False}, "answers", {}),
        ({"loss_type": "grpo", "use_bias_correction_kl": True}, "answers", {"kl_with_ratio": True}),
        ({"loss_type": "grpo", "delta": 1.2, "beta": 0.0}, "answers", {"dual_clip": 1.2, "kl_coefficient": 0.0}),
        ({"loss_type": "bnpo", "use_bias_correction_kl": False}, "tokens", {}),
        ({"loss_type": "dapo", "use_bias_correction_kl": False}, "tokens", {}),
        ({"loss_type": "dr_grpo", "use_bias_correction_kl": False, "scale_rewards": "none"}, "constant", {}),
        ({"loss_type": "cispo", "use_bias_correction_kl": False, "epsilon_high": 1.05}, "tokens", {"objective": "cispo"}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon": 3e-3, "epsilon_high": 4e-3},
            "answers",
            {"ratio": "sequence-mean", "policy_clip": (3e-3, 4e-3), "kl_coefficient": 0.0},
        ),
    ],
    ids=["grpo", "grpo-kl-ratio", "grpo-dual-clip", "bnpo", "dapo", "dr-grpo", "cispo", "gspo"],
)
def test_losses_and_gradients_are_trls(
    given: dict[str, Any], normaliser: str, ours: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run = trained("grpo", tokenizer, tmp_path, **({"beta": BETA} | given))
    values = GROUP | ({"scale": "none"} if given.get("scale_rewards") == "none" else {})
    compare(run, form_of(**ours), normaliser, values)


def test_rloo_is_trls(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run = trained("rloo", tokenizer, tmp_path, beta=BETA, learning_rate=1e-4)
    form = form_of(ratio="sequence-sum", kl_coefficient=0.0)
    values = {"baseline": "leave-one-out", "scale": "none", "epsilon": 1.0, "kl_where": "answer", "beta": BETA}
    compare(run, form, "answers", values)
