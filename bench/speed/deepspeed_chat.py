"""DeepSpeed-Chat itself as the peer of a PPO step: its engines, its trainer, its collator. A checkout of it is given; none is kept here.

    git clone https://github.com/microsoft/DeepSpeedExamples
    python bench/speed/ppo_step.py --chat DeepSpeedExamples/applications/DeepSpeed-Chat --only deepspeed

As its training/step3_rlhf_finetuning/main.py does with its own defaults on one device: ZeRO stage 0, no offload, no hybrid engine (which
needs CUDA), one generation batch, one training batch, one epoch. Three things are put in their places, none of which makes it slower:
torch's fused AdamW stands for the one that would be compiled, a logits processor ends each answer where it is planned to end, and dropout
is off, as in stage ppo. It throws answers of one token away, so that none is planned so short.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from bench.speed.ends import EndsAsPlanned
from bench.speed.sides import Pause
from bench.speed.workload import LONGEST, job_in
from rlhf.engine.order import Order
from rlhf.job import Job
from rlhf.models.scalar import load_scalar
from rlhf.models.tokenizer import load_tokenizer

FOLDERS = {"models/sft": "models/chat-actor", "models/reward": "models/chat-critic"}


def convert(job: Job) -> None:
    """The reward model as DeepSpeed-Chat reads it: pytorch_model.bin, the head named v_head, the backbone rwtransformer."""
    actor, critic = (job.root / FOLDERS[name] for name in ("models/sft", "models/reward"))
    shutil.copytree(job.input("models/sft"), actor)
    shutil.copytree(job.input("models/reward"), critic)
    tokenizer = load_tokenizer(actor)
    scalar = load_scalar(critic, tokenizer, job.params.launch.precision)
    backbone: torch.nn.Module = scalar.model.base_model
    weights = {f"rwtransformer.{name}": weight for name, weight in backbone.state_dict().items()}
    torch.save({**weights, "v_head.weight": scalar.head.weight.detach()}, critic / "pytorch_model.bin")


def arguments(job: Job, plan: Any) -> Namespace:
    """What its main.py is given."""
    params = job.params.ppo
    return Namespace(
        dtype=job.params.launch.precision,
        actor_zero_stage=0,
        critic_zero_stage=0,
        offload=False,
        offload_reference_model=False,
        offload_reward_model=False,
        enable_hybrid_engine=False,
        inference_tp_size=1,
        release_inference_cache=False,
        unpin_actor_parameters=False,
        tp_gather_partition_size=8,
        max_prompt_seq_len=LONGEST,
        max_answer_seq_len=plan.limit,
        enable_tensorboard=False,
        tensorboard_path="",
        enable_mixed_precision_lora=False,
        per_device_training_batch_size=params.mini_batch_size,
        gradient_accumulation_steps=1,
        gradient_accumulation_steps_actor=1,
        actor_dropout=0.0,
        critic_dropout=0.0,
        actor_lora_dim=0,
        critic_lora_dim=0,
        actor_weight_decay=params.actor.weight_decay,
        critic_weight_decay=params.critic.weight_decay,
        actor_lora_learning_rate=0.0,
        critic_lora_learning_rate=0.0,
        actor_learning_rate=params.actor.learning_rate,
        critic_learning_rate=params.critic.learning_rate,
        lr_scheduler_type="constant",
        num_warmup_steps=0,
        enable_ema=False,
        critic_gradient_checkpointing=False,
        num_padding_at_beginning=0,
        end_of_conversation_token="</s>",  # read once, for its id, and by nothing after that
        compute_fp32_loss=False,
        align_overflow=False,
        print_answers=False,
        print_answers_interval=0,
        local_rank=0,
    )


def side(pause: Pause, root: Path, plan: Any, prompts: list[list[int]], lengths: dict[tuple[int, ...], int], checkout: Path) -> None:
    """Its step, whenever it is told to."""
    job = job_in(root, "ppo")
    convert(job)
    sys.path.insert(0, str(checkout))
    import deepspeed
    from dschat.rlhf import rlhf_engine
    from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
    from dschat.utils.data.data_utils import DataCollatorRLHF, MiniDataset

    deepspeed.init_distributed(dist_backend="gloo")
    rlhf_engine.FusedAdam = lambda groups, lr, betas: torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    torch.manual_seed(1)
    tokenizer, given = load_tokenizer(root / FOLDERS["models/sft"]), arguments(job, plan)
    steps = job.params.ppo.steps
    engines = rlhf_engine.DeepSpeedRLHFEngine(
        actor_model_name_or_path=str(root / FOLDERS["models/sft"]),
        critic_model_name_or_path=str(root / FOLDERS["models/reward"]),
        tokenizer=tokenizer,
        num_total_iters=steps * plan.updates,
        args=given,
    )
    assert [engine.module.config.dropout for engine in (engines.actor, engines.critic)] == [0.0, 0.0], "it drops what stage ppo does not"
    trainer, collate = DeepSpeedPPOTrainer(engines, given), DataCollatorRLHF(given.max_prompt_seq_len, 1)
    ends = ends_as_planned(cast(PreTrainedModel, engines.actor.module), tokenizer.eos_token_id)
    order = Order(len(prompts), job.params.ppo.rollout_batch_size, job.seed("order"))
    pause()
    for step in range(steps):
        rows = [prompts[i] for i in order.batch(step)]
        ends[:] = [given.max_prompt_seq_len + lengths[tuple(row)] for row in rows]
        # it flips prompts before it pads them, and the whole batch back after that
        batch = collate([(torch.tensor(row).flip(0), torch.ones(len(row), dtype=torch.long), tokenizer.pad_token_id) for row in rows])
        found = trainer.generate_experience(batch["prompt"], batch["prompt_att_mask"], step)
        assert len(found["input_ids"]) == len(rows), "it threw answers away"
        for part in MiniDataset(1, given.per_device_training_batch_size).add(found):
            trainer.train_rlhf(part)
        pause()


def ends_as_planned(actor: PreTrainedModel, eos_id: int) -> list[int]:
    """Have an actor's answers end in columns that the list names, row by row, which is filled before each rollout."""
    ends: list[int] = []
    sample: Any = actor.generate
    actor.generation_config.eos_token_id = eos_id

    def planned(*given: Any, **options: Any) -> torch.Tensor:
        return sample(*given, **options, logits_processor=LogitsProcessorList([EndsAsPlanned(torch.tensor(ends), eos_id)]))

    setattr(actor, "generate", planned)  # noqa: B010  # a module takes it, its type does not
    return ends
