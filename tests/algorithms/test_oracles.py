"""Losses and estimators against TRL's own trainers on the same tiny models, and PPO's targets against numbers worked out by hand.

TRL's trainers get text and make their own batches, so that the chat template, the masks and the shift by one are compared along with the
arithmetic. Its PPO step stands in one function: one real step of it runs here, and what passes through the helpers that it calls is kept.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.algorithms import ppo
from rlhf.algorithms.dpo import dpo_loss
from rlhf.algorithms.language_model import next_token_loss
from rlhf.algorithms.pairwise import pairwise_loss
from rlhf.config.training import BuiltBase, Kl, Ppo
from rlhf.data.sandbox import make_rows
from rlhf.models.attention import attend_to_pieces
from rlhf.models.dialogues import encode_dialogue, encode_prompt
from rlhf.models.packed import pack
from rlhf.models.policy import build_policy, logits_at
from rlhf.models.scalar import ScalarModel
from rlhf.rollout.experience import Experience, Layout
from rlhf.stages import dpo as dpo_stage
from rlhf.stages import ppo as ppo_stage
from rlhf.stages.answering import answer_log_probs, answer_values
from rlhf.tensors import log_probs_and_entropy, mask_from_lengths

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[dev]'")

ROWS = make_rows("pairs", 4, 1, 0.0)  # the third has two turns
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
QUIET: dict[str, Any] = ON_CPU | {"report_to": "none", "per_device_train_batch_size": len(ROWS)}


def near(found: Tensor, expected: Tensor | list | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-5, atol=1e-5)


def policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    sizes = BuiltBase.model_construct(hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, context_tokens=128)
    return build_policy(sizes, tokenizer, seed)


def classifier(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = policy(tokenizer, seed).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    attend_to_pieces(model)
    return model


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def dataset(*columns: str) -> Any:
    """The rows as TRL takes them."""
    from datasets import Dataset

    rows = [{"prompt": row["prompt"], **{side: said(row[side]) for side in ("chosen", "rejected")}} for row in ROWS]
    return Dataset.from_list([{name: row["chosen" if name == "completion" else name] for name in columns} for row in rows])


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ------------------------------------------------------------------------------------------------ next token, pairs, DPO


def test_sft_loss_and_gradient_are_trls(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = policy(tokenizer, 1)
    settings = trl.SFTConfig(str(tmp_path), loss_type="nll", **QUIET)
    trainer = trl.SFTTrainer(model, settings, train_dataset=dataset("prompt", "completion"), processing_class=tokenizer)
    theirs = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    expected = gradient(model, theirs)

    rows = [encode_dialogue(tokenizer, [*row["prompt"], *said(row["chosen"])]) for row in ROWS]
    rows[2] = dpo_stage.encode_pairs(tokenizer, ROWS)[2][
        0
    ]  # where a stage learns from every answer of a dialogue, TRL's completion is the last one
    packed = pack([ids for ids, _ in rows], "cpu")
    wanted = packed.predictions([mask for _, mask in rows])
    ours = next_token_loss(logits_at(model, packed, wanted.places), wanted.targets, len(wanted.targets))
    near(ours, theirs)
    near(gradient(model, ours), expected)


def test_reward_loss_gradient_and_statistics_are_trls(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = classifier(tokenizer, 1)
    settings = trl.RewardConfig(str(tmp_path), disable_dropout=True, **QUIET)
    trainer = trl.RewardTrainer(model, settings, train_dataset=dataset("prompt", "chosen", "rejected"), processing_class=tokenizer)
    theirs = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    expected = gradient(model, theirs)
    logged = {name: trainer._metrics["train"][name][-1] for name in ("accuracy", "margin", "mean_reward")}

    sides = [ids for pair in dpo_stage.encode_pairs(tokenizer, ROWS) for ids, _ in pair]
    packed = pack(sides, "cpu")
    scores = ScalarModel(model)(**packed.inputs)[packed.last]
    ours, sums = pairwise_loss(scores[::2], scores[1::2], 4)
    near(ours, theirs)
    near(gradient(model, ours), expected)
    near(sums["accuracy"] / 4, logged["accuracy"])
    near(sums["margin"] / 4, logged["margin"])
    near((sums["chosen_score"] + sums["rejected_score"]) / 8, logged["mean_reward"])


@pytest.mark.parametrize(("loss", "name", "smoothing"), [("sigmoid", "sigmoid", 0.0), ("sigmoid", "aot", 0.2), ("ipo", "ipo", 0.0)])
def test_dpo_loss_gradient_and_statistics_are_trls(
    loss: str, name: str, smoothing: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # TRL applies label smoothing in its loss "aot", which sorts a batch's pairs: on one pair at a time it is conservative DPO
    model, reference = policy(tokenizer, 1), policy(tokenizer, 2)
    settings = trl.DPOConfig(
        str(tmp_path), beta=0.3, loss_type=[name], label_smoothing=smoothing, **{**QUIET, "per_device_train_batch_size": 1}
    )
    data = dataset("prompt", "chosen", "rejected")
    trainer = trl.DPOTrainer(model, reference, settings, train_dataset=data, processing_class=tokenizer)
    theirs = torch.stack([trainer.compute_loss(model, batch) for batch in trainer.get_train_dataloader()]).mean()
    expected = gradient(model, theirs)
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}

    given = dpo_stage.encode_pairs(tokenizer, ROWS)
    before = dpo_stage.pair_log_probs(reference, given)
    now = dpo_stage.pair_log_probs(model, given)
    known = before[0].detach(), before[1].detach()
    if loss == "ipo":
        # TRL takes means over an answer's tokens where the paper's equation, and ours, has sums
        tokens = [torch.tensor([sum(pair[side][1]) for pair in given]) for side in (0, 1)]
        ours, _ = dpo_loss((now[0] / tokens[0], now[1] / tokens[1]), (known[0] / tokens[0], known[1] / tokens[1]), loss, 0.3, 0.0, 4)
    else:
        ours, _ = dpo_loss(now, known, loss, 0.3, smoothing, 4)
    near(ours, theirs)
    near(gradient(model, ours), expected)
    _, sums = dpo_loss(now, known, loss, 0.3, smoothing, 4)
    near(sums["chosen_reward"] / 4, logged["rewards/chosen"])
    near(sums["rejected_reward"] / 4, logged["rewards/rejected"])
    near(sums["margin"] / 4, logged["rewards/margins"])
    near(sums["accuracy"] / 4, logged["rewards/accuracies"])


# ------------------------------------------------------------------------------------------------------------- a PPO step


class Seen:
    """A helper of TRL's PPO step that keeps the tensors that it was called with and what it gave."""

    def __init__(self, helper: Any) -> None:
        self.helper = helper
        self.given: list[list[Tensor]] = []
        self.gave: list[Any] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.given.append([argument.detach().clone() for argument in arguments if isinstance(argument, Tensor)])
        self.gave.append(self.helper(*arguments, **options))
        return self.gave[-1]


@dataclass
class TrlStep:
    """One step of TRL's PPO: two updates on four answers, of which some end before the others."""

    models: dict[str, PreTrainedModel]  # as they were before it
    sequences: list[list[int]]
    prompt_lengths: list[int]
    answers: Tensor  # (B, A)
    mask: Tensor  # (B, A)
    longer: Tensor  # (B, A) as TRL counts: an answer that has ended goes on for one token, which bears its score
    log_probs: Tensor
    reference_log_probs: Tensor
    values: Tensor
    scores: Tensor
    advantages: Tensor  # not whitened
    whitened: Tensor
    updates: list[tuple[Tensor, Tensor, Tensor]]  # logits (B, A, V), log-probabilities and values (B, A)
    estimator: str
    logged: dict[str, float]


TEMPERATURE, BETA, GAMMA, LAMBDA, CLIP, VALUE_CLIP = 0.9, 0.3, 0.97, 0.9, 0.1, 0.05


@pytest.fixture(scope="module", params=["k1", "k3"])
def step(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> TrlStep:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    sizes: dict[str, Any] = {
        "num_ppo_epochs": 2,
        "num_mini_batches": 1,
        "total_episodes": 4,
        "response_length": 9,
        "num_sample_generations": 0,
    }
    optimizer: dict[str, Any] = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "save_strategy": "no", "stop_token": "eos"}
    rewarding: dict[str, Any] = {"temperature": TEMPERATURE, "kl_coef": BETA, "kl_estimator": request.param, "gamma": GAMMA, "lam": LAMBDA}
    losses: dict[str, Any] = {"cliprange": CLIP, "cliprange_value": VALUE_CLIP}
    settings = PPOConfig(str(tmp_path_factory.mktemp("trl")), **QUIET, **sizes, **optimizer, **rewarding, **losses)
    actor, reference, reward, critic = policy(tokenizer, 1), policy(tokenizer, 2), classifier(tokenizer, 3), classifier(tokenizer, 4)
    with torch.no_grad():
        actor.lm_head.weight[tokenizer.eos_token_id] *= 3  # so that some answers end early
    models = {"actor": copy.deepcopy(actor), "reference": reference, "reward": reward, "critic": copy.deepcopy(critic)}
    prompts = Dataset.from_list([{"input_ids": encode_prompt(tokenizer, row["prompt"])} for row in ROWS])
    with pytest.MonkeyPatch.context() as patch:
        seen = {name: Seen(getattr(ppo_trainer, name)) for name in ("selective_log_softmax", "get_reward", "masked_whiten", "forward")}
        for name, helper in seen.items():
            patch.setattr(ppo_trainer, name, helper)
        patch.setattr(np.random, "permutation", np.arange)  # the mini-batch is the whole batch: its rows stay in their order
        trainer = PPOTrainer(settings, tokenizer, actor, reference, reward, prompts, critic)
        log = Seen(lambda metrics: metrics)
        patch.setattr(trainer, "log", log)
        trainer.train()

    (_, answers), *_ = seen["selective_log_softmax"].given
    log_probs, reference_log_probs, *new_log_probs = seen["selective_log_softmax"].gave
    (all_values, _, _), (_, scores, _) = seen["get_reward"].gave
    width = answers.shape[1]
    lengths = (answers != tokenizer.pad_token_id).sum(1)
    assert lengths.min() < width == lengths.max()
    asked = [[token for token in row if token != tokenizer.pad_token_id] for row in seen["get_reward"].given[0][0][:, :-width].tolist()]
    logits = [given[0] for given in seen["selective_log_softmax"].given[2:]]
    new_values = [values[:, -width - 1 : -1].squeeze(-1).detach() for _, values in seen["forward"].gave[1:]]
    return TrlStep(
        models=models,
        sequences=[prompt + row[:length] for prompt, row, length in zip(asked, answers.tolist(), lengths.tolist(), strict=True)],
        prompt_lengths=[len(prompt) for prompt in asked],
        answers=answers,
        mask=mask_from_lengths(lengths, width),
        longer=mask_from_lengths(lengths + 1, width),
        log_probs=log_probs,
        reference_log_probs=reference_log_probs,
        values=all_values[:, -width - 1 : -1].squeeze(-1),
        scores=scores,
        advantages=seen["masked_whiten"].given[0][0],
        whitened=seen["masked_whiten"].gave[0],
        updates=list(zip(logits, [new.detach() for new in new_log_probs], new_values, strict=True)),
        estimator=request.param,
        logged=log.gave[0],
    )


@torch.no_grad()
def test_ppo_log_probs_values_and_scores_are_trls(step: TrlStep) -> None:
    at = Layout.of(step.sequences, step.prompt_lengths, step.mask.shape[1], torch.device("cpu"))
    near(answer_log_probs(step.models["actor"], at, TEMPERATURE), step.log_probs * step.mask)
    near(answer_log_probs(step.models["reference"], at, TEMPERATURE), step.reference_log_probs * step.mask)
    near(answer_values(ScalarModel(step.models["critic"]), at), step.values * step.mask)
    near(ScalarModel(step.models["reward"])(**at.packed.inputs)[at.packed.last], step.scores)


def targets(step: TrlStep) -> tuple[Tensor, Tensor, Tensor]:
    """KL, advantages before whitening, and returns."""
    kl = ppo.kl_estimate(step.log_probs, step.reference_log_probs, step.estimator) * step.mask
    rewards = ppo.token_rewards(kl, step.scores, step.longer, BETA)
    return kl, *ppo.gae(rewards, step.values, step.longer, GAMMA, LAMBDA)


def test_ppo_rewards_and_advantages_are_trls(step: TrlStep) -> None:
    kl, advantages, _ = targets(step)
    near(kl.sum(1).mean(), step.logged["objective/kl"])
    near(-BETA * kl.sum(1).mean() + step.scores.mean(), step.logged["objective/rlhf_reward"])
    near(advantages, step.advantages)
    # TRL divides by the standard deviation of a sample, n − 1
    counted = step.mask.sum().item()
    near(ppo.whiten(advantages, step.mask) * math.sqrt((counted - 1) / counted), step.whitened * step.mask)


def test_ppo_losses_are_trls(step: TrlStep) -> None:
    _, _, returns = targets(step)
    mask, longer, advantages = step.mask, step.longer, step.whitened * step.mask
    found: list[dict[str, float]] = []
    for logits, log_probs, values in step.updates:
        ours, entropies = log_probs_and_entropy(logits.flatten(0, 1), step.answers.flatten())
        near(ours.view(step.answers.shape), log_probs)
        actor = ppo.policy_loss(log_probs, step.log_probs, advantages, mask, (CLIP, CLIP), None, mask.sum().item())
        critic = ppo.value_loss(values, step.values, returns, longer, VALUE_CLIP, longer.sum().item())
        found.append(
            {
                "loss/policy_avg": actor.loss.item(),
                "loss/value_avg": critic.loss.item(),
                "policy/clipfrac_avg": (actor.sums["clip_fraction"] / mask.sum()).item(),
                "val/clipfrac_avg": (critic.sums["value_clip_fraction"] / longer.sum()).item(),
                "policy/approxkl_avg": (ppo.kl_estimate(log_probs, step.log_probs, "k2") * mask).mean().item(),
                "policy/entropy_avg": entropies.mean().item(),
            }
        )
    means = {name: sum(row[name] for row in found) / len(found) for name in found[0]}
    assert means == pytest.approx({name: step.logged[name] for name in means}, rel=1e-5, abs=1e-5)
    assert min(means["policy/clipfrac_avg"], means["val/clipfrac_avg"]) > 0.1


# ------------------------------------------------------------------------------------------------ the targets, by hand


def experience() -> Experience:
    """Two answers, of two tokens that end and of three that were cut off; probabilities of 1/2 against a reference of 1/4."""
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    return Experience(
        sequences=[[1, 2, 3], [1, 2, 3, 4]],
        prompt_lengths=[1, 1],
        mask=mask,
        ended=torch.tensor([True, False]),
        scores=torch.tensor([9.0, 1.0]),
        log_probs=math.log(0.5) * mask,
        rollout_log_probs=math.log(0.5) * mask,
        reference_log_probs=math.log(0.25) * mask,
        values=torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]),
    )


def settings(**changes: Any) -> Ppo:
    kl = Kl.model_construct(estimator="k1")
    rewards: dict[str, Any] = {"kl": kl, "reward_clip": 5.0, "no_eos_reward": -2.0}
    return Ppo.model_construct(**rewards, **{"gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False} | changes)


def test_targets_and_their_statistics() -> None:
    ln2 = math.log(2)
    targets, stats = ppo_stage.advantages(experience(), settings(), beta=1 / ln2)  # a penalty of 1 per token
    # token rewards: −1, −1 + 5 (9 clipped); and −1, −1, −1 − 2, as the second did not end
    near(targets.returns, [[3.0, 4.0, 0.0], [-5.0, -4.0, -3.0]])
    near(targets.advantages, [[2.0, 2.0, 0.0], [-5.0, -5.0, -6.0]])
    # returns 3, 4, −5, −4, −3: mean −1, variance 14; residuals 2, 2, −5, −5, −6: mean −2.4, variance 13.04
    expected = {"score": 5.0, "reward": 1.5, "total_reward": (3 - 5) / 2, "kl": 2.5 * ln2, "eos_rate": 0.5, "answer_tokens": 2.5}
    expected |= {"beta": 1 / ln2, "advantage_std": math.sqrt(13.04), "explained_variance": 1 - 13.04 / 14}
    assert stats == pytest.approx(expected, rel=1e-6)


def test_whitened_targets_keep_the_returns() -> None:
    plain, stats = ppo_stage.advantages(experience(), settings(), beta=0.1)
    white, same = ppo_stage.advantages(experience(), settings(whiten_advantages=True), beta=0.1)
    near(white.returns, plain.returns)
    assert same == stats
    valid = white.advantages[experience().mask.bool()]
    near(valid.mean(), 0.0)
    near(valid.std(correction=0), 1.0)
    assert white.advantages[0, 2] == 0
