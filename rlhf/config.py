"""The one schema of params.yaml.

Every value of a run stands in params.yaml; this module gives its type, bounds and meaning, and no default of its own: a
missing key is an error, an unknown one too. ``docs/params.md`` is generated from the descriptions below (``rlhf reference``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from rlhf.errors import UserError

STAGES = ("prepare", "base", "sft", "reward", "ppo", "evaluate")
SLICES = ("text", "sft", "reward", "ppo", "judge", "heldout")

# What a row of each kind can be used for: a pair also holds a demonstration (prompt + chosen) and a prompt.
SLICES_OF_KIND: dict[str, frozenset[str]] = {
    "text": frozenset({"text", "heldout"}),
    "prompts": frozenset({"ppo", "heldout"}),
    "messages": frozenset({"text", "sft", "ppo", "heldout"}),
    "pairs": frozenset({"text", "sft", "reward", "ppo", "judge", "heldout"}),
}

# What each stage's result depends on; dvc.yaml says the same, and a test holds the two together.
PARAMS_OF_STAGE = {
    "prepare": ("seed", "data", "prepare"),
    "base": ("seed", "base", "launch.precision"),
    "sft": ("seed", "sft", "launch.precision"),
    "reward": ("seed", "reward", "launch.precision"),
    "ppo": ("seed", "ppo", "launch.precision"),
    "evaluate": (
        *("seed", "data", "evaluate", "launch.precision"),
        *("ppo.max_prompt_tokens", "ppo.max_answer_tokens", "reward.max_tokens"),
    ),
}

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


# ---------------------------------------------------------------------------------------------------------------- data


class Split(Section):
    """Relative shares in which a source's rows are dealt to the slices, after a seeded shuffle. No row is in two slices."""

    text: NonNegative = Field(description="plain text that the base model is pretrained on and that ppo mixes in")
    sft: NonNegative = Field(description="demonstrations for sft")
    reward: NonNegative = Field(description="preference pairs for the reward model")
    ppo: NonNegative = Field(description="prompts that ppo answers")
    judge: NonNegative = Field(description="pairs for the independent judge of evaluate, where no gold score exists")
    heldout: NonNegative = Field(description="rows that no stage trains on: evaluation reads them")

    def uses(self, slice_name: str) -> bool:
        return getattr(self, slice_name) > 0


class SandboxSource(Section):
    """Rows made by the project itself (rlhf/data/sandbox.py): no file, no download, a known gold score."""

    name: Slug = Field(description="name of the source in logs, metrics and the quarantine file")
    format: Literal["sandbox"]
    kind: Literal["text", "messages", "pairs", "prompts"] = Field(description="what each row is")
    rows: PositiveInt = Field(description="how many rows to make")
    label_noise: Fraction = Field(description="share of pairs whose preference label is flipped (kind pairs only)")
    split: Split


class Columns(Section):
    """Names of the columns (or JSON keys) that the format reads."""

    prompt: str | None = Field(description="pairs: the prompt, text or a message list; null where chosen and rejected hold whole dialogues")
    chosen: str = Field(description="hh, pairs: the preferred answer or dialogue")
    rejected: str = Field(description="hh, pairs: the other answer or dialogue")
    messages: str = Field(description="messages: the list of {role, content}")
    question: str = Field(description="qa: the question")
    answer: str = Field(description="qa: the answer")
    text: str = Field(description="text: the passage")


class FileSource(Section):
    """Rows of a file, a folder written by `datasets`, or a hub dataset."""

    name: Slug = Field(description="name of the source in logs, metrics and the quarantine file")
    format: Literal["hh", "pairs", "messages", "qa", "text"] = Field(description="how a row is read")
    path: str | None = Field(
        description="JSONL, JSON, CSV or Parquet file (also .gz), or a folder of `datasets`, under data/raw; `rlhf use` brings a file "
        "from elsewhere there and versions it with DVC"
    )
    hub: str | None = Field(description="hub id of a dataset, instead of path")
    revision: str | None = Field(description="commit or tag of the hub dataset; required with hub, so that a run can be repeated")
    hub_split: str | None = Field(description="split of the hub dataset or `datasets` folder, for example train")
    columns: Columns
    split: Split

    @property
    def kind(self) -> str:
        return {"hh": "pairs", "pairs": "pairs", "messages": "messages", "qa": "messages", "text": "text"}[self.format]

    @model_validator(mode="after")
    def _one_place(self) -> FileSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"source '{self.name}': give exactly one of path and hub")
        if self.hub is not None and self.revision is None:
            raise ValueError(f"source '{self.name}': hub '{self.hub}' needs a revision (a commit or tag), so that a run can be repeated")
        return self


Source = Annotated[SandboxSource | FileSource, Field(discriminator="format")]


class Data(Section):
    sources: list[Source] = Field(min_length=1, description="where the rows come from")

    @model_validator(mode="after")
    def _sources(self) -> Data:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named '{name}': give each its own name")
        for source in self.sources:
            for slice_name in SLICES:
                if source.split.uses(slice_name) and slice_name not in SLICES_OF_KIND[source.kind]:
                    usable = ", ".join(s for s in SLICES if s in SLICES_OF_KIND[source.kind])
                    raise ValueError(
                        f"source '{source.name}': rows of format {source.format} ({source.kind}) cannot be used for split.{slice_name}; "
                        f"set it to 0 (usable: {usable})"
                    )
            if not any(source.split.uses(s) for s in SLICES):
                raise ValueError(f"source '{source.name}': every share of its split is 0, so that no row would be used")
        return self

    def feeding(self, slice_name: str) -> list[Source]:
        """The sources that give rows to a slice."""
        return [source for source in self.sources if source.split.uses(slice_name)]

    @property
    def has_gold(self) -> bool:
        """Whether every held-out prompt comes with a gold score."""
        return all(source.format == "sandbox" for source in self.feeding("heldout") if source.kind != "text")


class Prepare(Section):
    max_characters: PositiveInt = Field(description="a row with a longer dialogue or passage is quarantined as over-long")
    max_quarantined_share: Fraction = Field(description="prepare fails when a source loses a larger share of its rows to quarantine")


# ------------------------------------------------------------------------------------------------------------ training


class Optimizer(Section):
    """AdamW with linear warm-up, then a schedule."""

    learning_rate: Positive = Field(description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(description="course of the learning rate after warm-up, down to final_ratio")
    final_ratio: Fraction = Field(description="last learning rate as a share of the peak (linear and cosine)")
    warmup_ratio: Fraction = Field(description="share of the steps over which the learning rate rises from 0")
    betas: tuple[Fraction, Fraction] = Field(description="Adam's β1 and β2")
    epsilon: Positive = Field(description="Adam's ε")
    weight_decay: NonNegative = Field(description="decoupled weight decay, on matrices only")
    max_grad_norm: Positive = Field(description="gradients are scaled down to this global norm")


class BuiltBase(Section):
    """A small Llama (grouped-query attention) with its own byte-level BPE tokenizer, pretrained here on the text slice."""

    source: Literal["build"]
    vocab_size: Annotated[int, Field(ge=300)] = Field(description="tokens of the BPE vocabulary, special tokens included")
    hidden_size: PositiveInt = Field(description="width of the model")
    intermediate_size: PositiveInt = Field(description="width of the feed-forward layers")
    layers: PositiveInt = Field(description="number of transformer layers")
    heads: PositiveInt = Field(description="attention heads (queries)")
    kv_heads: PositiveInt = Field(description="attention heads of keys and values; divides heads")
    max_tokens: PositiveInt = Field(description="length of the packed pretraining sequences, in tokens")
    context_tokens: PositiveInt = Field(description="longest sequence that the model takes (position embeddings)")
    epochs: Positive = Field(description="passes over the text slice")
    batch_size: PositiveInt = Field(description="packed sequences per optimiser step, over all processes")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")

    @model_validator(mode="after")
    def _heads(self) -> BuiltBase:
        if self.heads % self.kv_heads or self.hidden_size % self.heads:
            raise ValueError(
                f"heads ({self.heads}) must divide hidden_size ({self.hidden_size}) and be a multiple of kv_heads ({self.kv_heads})"
            )
        return self


class PretrainedBase(Section):
    """A given model, pinned: every later stage reads the copy in models/base."""

    source: Literal["pretrained"]
    model: str = Field(description="folder of a Hugging Face model, or a hub id")
    revision: str | None = Field(description="commit or tag of the hub model; null for a folder")
    trust_remote_code: bool = Field(description="run Python code that comes with the model; leave off unless you have read that code")
    chat_template: Literal["keep", "turns"] = Field(
        description="keep: the tokenizer's own chat template (required then); turns: the project's plain Human/Assistant template"
    )


Base = Annotated[BuiltBase | PretrainedBase, Field(discriminator="source")]


class Sft(Section):
    epochs: Positive = Field(description="passes over the demonstrations, each in a fresh order")
    batch_size: PositiveInt = Field(description="dialogues per optimiser step, over all processes")
    max_tokens: PositiveInt = Field(description="longer dialogues are left out and counted")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")


class Reward(Section):
    epochs: Positive = Field(description="passes over the pairs, each in a fresh order")
    batch_size: PositiveInt = Field(description="pairs per optimiser step, over all processes")
    max_tokens: PositiveInt = Field(description="pairs with a longer side are left out and counted")
    optimizer: Optimizer
    checkpoint_every: PositiveInt = Field(description="optimiser steps between checkpoints")


class Kl(Section):
    """The penalty that keeps the policy near sft."""

    coefficient: NonNegative = Field(description="β of the token reward −β·KL; the first value under the adaptive controller")
    controller: Literal["fixed", "adaptive"] = Field(description="adaptive: β follows the measured KL (arXiv 1909.08593, section 2.2)")
    target: Positive = Field(description="adaptive: KL per answer, in nats, that β steers to")
    horizon: PositiveInt = Field(description="adaptive: answers over which β reacts")
    estimator: Literal["k1", "k2", "k3"] = Field(description="per-token KL estimator in the reward (Schulman 2020)")


class PpoStop(Section):
    """A run that leaves these bounds has diverged: the stage stops with an error, and its last checkpoint is kept."""

    kl: Positive = Field(description="KL to sft, mean per answer in nats")
    score: Positive = Field(description="mean score of the reward model in standard deviations of its held-out scores, up or down")


class Ppo(Section):
    steps: PositiveInt = Field(description="rollout batches, each followed by `epochs` passes of updates")
    rollout_batch_size: PositiveInt = Field(description="answers per rollout, over all processes")
    mini_batch_size: PositiveInt = Field(description="answers per optimiser step, over all processes; divides rollout_batch_size")
    epochs: PositiveInt = Field(description="passes over each rollout batch")
    max_prompt_tokens: PositiveInt = Field(description="longer prompts are left out and counted")
    max_answer_tokens: PositiveInt = Field(description="an answer is cut off here if it has not ended by itself")
    temperature: Positive = Field(description="sampling temperature; log-probabilities are divided by it everywhere")
    top_k: Annotated[int, Field(ge=0)] = Field(description="sample among the k likeliest tokens; 0: all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(description="sample in the nucleus of this mass; 1: all")
    kl: Kl
    reward_clip: Positive = Field(description="normalised reward-model scores are clipped to ± this")
    no_eos_reward: float = Field(description="score of an answer that was cut off, instead of the reward model's")
    gamma: Fraction = Field(description="discount γ of GAE")
    gae_lambda: Fraction = Field(description="λ of GAE")
    whiten_advantages: bool = Field(description="scale advantages to mean 0, std 1 over the valid tokens of the global rollout batch")
    policy_clip: tuple[Fraction, Positive] = Field(
        description="how far the ratio may fall below and rise above 1 before its gradient is cut; equal in PPO, wider upwards in DAPO"
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        description="bound of the ratio for tokens with a negative advantage; null: none"
    )
    value_clip: Positive | None = Field(description="range in which a new value may move from the old one; null: any")
    entropy_coefficient: NonNegative = Field(description="weight of the entropy bonus; 0: off")
    max_approx_kl: Positive = Field(description="updates on a rollout stop once the policy moved this far from it (nats per token)")
    mixture_coefficient: NonNegative = Field(description="weight of the next-token loss on plain text (PPO-ptx); 0: off")
    mixture_batch_size: PositiveInt = Field(description="passages per optimiser step of the mixture loss, over all processes")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="share of its old value that an fp32 moving average of the policy keeps at each update; the stage then hands on the "
        "average; null: off"
    )
    critic_warmup_steps: Annotated[int, Field(ge=0)] = Field(description="first steps in which only the critic learns")
    actor: Optimizer
    critic: Optimizer
    stop: PpoStop
    checkpoint_every: PositiveInt = Field(description="steps between checkpoints")

    @model_validator(mode="after")
    def _batches(self) -> Ppo:
        if self.rollout_batch_size % self.mini_batch_size:
            raise ValueError(f"mini_batch_size ({self.mini_batch_size}) must divide rollout_batch_size ({self.rollout_batch_size})")
        return self


class Evaluate(Section):
    prompts: PositiveInt = Field(description="at most so many held-out prompts are answered by each model")
    pairs: PositiveInt = Field(description="at most so many held-out pairs test the reward model")
    texts: PositiveInt = Field(description="at most so many held-out passages measure perplexity")
    batch_size: PositiveInt = Field(description="prompts answered at a time")
    temperature: Positive = Field(description="sampling temperature of the answers compared")
    bootstrap_samples: PositiveInt = Field(description="resamples of the 95% intervals")
    shown: PositiveInt = Field(description="prompts shown with both answers")
    judge: Reward = Field(description="training of the second reward model that judges where there is no gold score")


class Promote(Section):
    """Gates: a version becomes champion only if every one holds."""

    model: Slug = Field(description="name of the registered model")
    min_gold_difference: float = Field(description="gold score of ppo − sft, lower end of its 95% interval (where a gold score exists)")
    min_win_rate: Fraction = Field(description="win rate against sft, lower end of its 95% interval")
    min_reward_accuracy: Fraction = Field(description="reward model's accuracy on held-out pairs")
    max_kl: Positive = Field(description="KL to sft per answer, in nats")
    max_perplexity_ratio: Positive = Field(description="perplexity on plain text, ppo over sft")
    min_eos_rate: Fraction = Field(description="share of answers that end by themselves")
    max_answer_tokens: Positive = Field(description="mean answer length, in tokens")
    max_regression: NonNegative = Field(
        description="how far the score (gold, or else win rate) may lie below the champion's on the same held-out set"
    )


class JobLayout(Section):
    """How one stage's processes are laid out."""

    processes: PositiveInt = Field(description="ranks per node; on GPU, one GPU each")
    threads: PositiveInt = Field(description="CPU threads per rank")
    micro_batch_size: PositiveInt = Field(
        description="rows that one rank passes through the model at a time; less where the batch is smaller"
    )


class Jobs(Section):
    base: JobLayout
    sft: JobLayout
    reward: JobLayout
    ppo: JobLayout
    evaluate: JobLayout


class Launch(Section):
    """Where and how to run. No stage depends on it, precision aside: batch sizes are global, so the hardware changes no result."""

    accelerator: Literal["auto", "cpu", "cuda"] = Field(description="auto: cuda where a GPU is present, else cpu")
    precision: Literal["fp32", "bf16"] = Field(description="arithmetic of the models; optimiser states are fp32")
    zero_stage: Annotated[int, Field(ge=0, le=2)] = Field(description="DeepSpeed ZeRO stage of the trained models")
    hostfile: str | None = Field(description="DeepSpeed hostfile for several nodes; null: this machine")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(description="rendezvous port of the ranks; 0: a free one")
    timeout_minutes: Positive = Field(description="a stage that runs longer is stopped")
    jobs: Jobs


class Tracking(Section):
    uri: str | None = Field(description="MLflow tracking server; null: the database mlruns/mlflow.db; MLFLOW_TRACKING_URI goes first")
    experiment: str = Field(description="MLflow experiment of the runs")


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(description="all randomness of a run derives from it")
    data: Data
    prepare: Prepare
    base: Base
    sft: Sft
    reward: Reward
    ppo: Ppo
    evaluate: Evaluate
    promote: Promote
    launch: Launch
    tracking: Tracking

    @model_validator(mode="after")
    def _every_stage_has_data(self) -> Params:
        needs = {"sft": "sft needs demonstrations", "reward": "reward needs preference pairs", "ppo": "ppo needs prompts"}
        if self.base.source == "build":
            needs["text"] = "base.source: build needs text to pretrain on"
        elif self.ppo.mixture_coefficient > 0:
            needs["text"] = "ppo.mixture_coefficient above 0 needs text"
        if not self.data.has_gold:
            needs["judge"] = "evaluate needs pairs for its judge, as these sources have no gold score"
        for slice_name, why in needs.items():
            if not self.data.feeding(slice_name):
                formats = ", ".join(
                    sorted({k if k != "messages" else "messages or qa" for k, v in SLICES_OF_KIND.items() if slice_name in v})
                )
                raise ValueError(f"data.sources: {why}, but no source has split.{slice_name} above 0; add a source of kind {formats}")
        heldout_kinds = {source.kind for source in self.data.feeding("heldout")}
        if "pairs" not in heldout_kinds:
            raise ValueError("data.sources: evaluate needs held-out pairs, but no source of pairs has split.heldout above 0")
        if self.base.source == "build":
            longest = max(self.sft.max_tokens, self.reward.max_tokens, self.ppo.max_prompt_tokens + self.ppo.max_answer_tokens)
            if longest > self.base.context_tokens:
                raise ValueError(
                    f"base.context_tokens is {self.base.context_tokens}, but a stage uses sequences of {longest} tokens: raise it"
                )
        return self

    def of_stage(self, stage: str) -> dict[str, Any]:
        """The values that determine a stage's result, by dotted key: what dvc.yaml lists under its params."""
        return {key: _at(self.model_dump(mode="json"), key) for key in PARAMS_OF_STAGE[stage]}


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or a key is missing, unknown or out of bounds; the message names file, key,
            value and what would be right.
    """
    return validate(read(path), str(path))


def read(path: Path) -> Any:
    """The content of a YAML file, not checked yet.

    Raises:
        UserError: the file is missing or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", remedy="write it with `rlhf use sandbox`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}", remedy=f"correct {path}, or `rlhf use PRESET`") from None


def validate(raw: object, origin: str) -> Params:
    """Check the parsed content of params.yaml; `origin` names it in errors."""
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(f"{origin}: {_explain(e)}" for e in error.errors()), remedy="see docs/params.md for every key") from None


def _explain(error: Any) -> str:
    # pydantic puts the union's tag into the location ("sources.0.hh.path"): not a key of the file
    tags = {"sandbox", "hh", "pairs", "messages", "qa", "text", "build", "pretrained"}
    location = list(error["loc"])
    key = ".".join(
        str(part)
        for i, part in enumerate(location)
        if not (part in tags and i > 0 and (location[i - 1] == "base" or isinstance(location[i - 1], int)))
    )
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    return f"{key or 'params'}: {message}" + ("" if isinstance(error["input"], (dict, list, BaseModel)) else f", got {error['input']!r}")
