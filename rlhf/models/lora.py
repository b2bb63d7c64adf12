"""Low-rank adapters (LoRA, arXiv 2106.09685): a small matrix product beside each frozen weight is trained instead of the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config.training import Lora
from rlhf.engine.partition import born
from rlhf.engine.setup import frozen, settings
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.models.policy import load_policy
from rlhf.tensors import shape

if TYPE_CHECKING:
    from peft import PeftModel  # it is loaded where there are adapters: a fifth of a second in each stage that has none

# The policy that PPO and DPO stay near, for as long as it is asked.
Reference = Callable[[], AbstractContextManager[PreTrainedModel]]


@dataclass(frozen=True)
class Adapters:
    """The adapters inside a model. The model stays the object that it was: who calls it need not know of them."""

    model: PreTrainedModel
    peft: PeftModel
    trainable_share: float  # trained parameters as a share of all

    @contextmanager
    def off(self) -> Iterator[PreTrainedModel]:
        """The model as it was before training, for measuring: no adapters, no gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.peft.disable_adapter():
                yield self.model
        finally:
            self.model.train(training)

    def holding(self, weights: Mapping[str, Tensor]) -> Adapters:
        """The same adapters in a model of its own with these weights, by the names that they have in this one."""
        from peft import get_peft_model

        config = self.peft.peft_config["default"]
        base = config.base_model_name_or_path
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
            peft = get_peft_model(model, config, autocast_adapter_dtype=False)
        config.base_model_name_or_path = base
        model.load_state_dict(weights, assign=True)
        return Adapters(model, peft, self.trainable_share)

    def save_and_merge(self, folder: Path) -> None:
        """Write the adapters in peft's form, then add them to the weights: the model is an ordinary one again."""
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # a form to fill in
        self.peft.merge_and_unload()


def attach(model: PreTrainedModel, lora: Lora | None, base: str, key: str, job: Job) -> Adapters | None:
    """Put adapters into a model and freeze its other weights, save the head of a reward model or critic; None where `lora` is null.

    An adapter starts at zero, so that the model computes at first what it did before.

    Args:
        base: output that the model was loaded from, for example models/sft; the saved adapters name it.
        key: where `lora` stands in params.yaml, for example ppo.actor_lora.

    Raises:
        UserError: the model has no layer of one of the names.
    """
    if lora is None:
        return None
    from peft import LoraConfig, TaskType, get_peft_model

    _check_targets(model, lora.targets, f"{key}.targets")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        target_modules=lora.targets,
        task_type=TaskType.CAUSAL_LM if model.can_generate() else TaskType.SEQ_CLS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed(key))
        peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    # an output must not hold a path of this machine, nor the chance order of a set
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules or ())
    sizes = [(math.prod(shape(parameter)), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    job.say(f"{key}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    return Adapters(model, peft, trained / total)


def _check_targets(model: PreTrainedModel, targets: str | list[str], key: str) -> None:
    # peft would say nothing of one among others, and take embeddings: merged into tied ones, an adapter changes both ends of a model
    tied = model.get_input_embeddings().weight
    linear = (torch.nn.Linear, Conv1D)
    layers = [name for name, module in model.named_modules() if isinstance(module, linear) and module.weight is not tied]
    gone = [] if isinstance(targets, str) else [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if gone:
        names = sorted({layer.rpartition(".")[2] for layer in layers})
        raise UserError(f"{key}: the model has no linear layer named {', '.join(gone)}", remedy=f"names of this model: {', '.join(names)}")


def reference(adapters: Adapters | None, job: Job, folder: Path, device: torch.device) -> Reference:
    """The policy in `folder`, from which training started: the trained one without its adapters; a frozen copy where it has none."""
    if adapters:
        return adapters.off
    with born(settings(job, "reference")):
        model = load_policy(folder, job.params.launch.precision)
    scored = frozen(model, job, "reference", device)
    return lambda: nullcontext(scored)


def share(adapters: Adapters | None) -> dict[str, float]:
    """What a stage's metrics file says of them."""
    return {"trainable_share": adapters.trainable_share} if adapters else {}
