"""The one schema of params.yaml.

Every value of a run stands in params.yaml; this package gives its type, bounds and meaning, and no default of its own: a
missing key is an error, an unknown one too. ``docs/params.md`` is generated from the descriptions below (``rlhf reference``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from rlhf.config import algorithms, text
from rlhf.config.awac import Awac
from rlhf.config.data import SLICES_OF_KIND, Data, Prepare
from rlhf.config.feedback import Feedback
from rlhf.config.group import Grpo
from rlhf.config.operations import Launch, Operations, Promote, Tracking
from rlhf.config.rewards import RewardEntry, check_rewards
from rlhf.config.section import Section
from rlhf.config.serving import Serving
from rlhf.config.stored import Answers, BestOfN, Iterative, Rrhf
from rlhf.config.training import Answering, Base, Dpo, Evaluate, Ppo, Reward, Sft
from rlhf.errors import UserError

Key = tuple[str | int, ...]  # of a value in params.yaml; a number is a place in a list

STAGES = (
    "prepare", "base", "sft", "reward", "awac", "ppo", "grpo", "dpo", "answers", "best_of_n", "rrhf", "round", "iterative", "evaluate",
)  # fmt: skip
# The stages of a run, by the one that makes the policy (`Params.policy`); before that one awac, where it is asked for. Of iterative,
# answers and round come once for each round.
STAGES_OF = {
    "ppo": ("prepare", "base", "sft", "reward", "ppo", "evaluate"),
    "grpo": ("prepare", "base", "sft", "reward", "grpo", "evaluate"),
    "dpo": ("prepare", "base", "sft", "dpo", "evaluate"),
    "best_of_n": ("prepare", "base", "sft", "reward", "answers", "best_of_n", "evaluate"),
    "rrhf": ("prepare", "base", "sft", "reward", "answers", "rrhf", "evaluate"),
    "iterative": ("prepare", "base", "sft", "reward", "answers", "round", "iterative", "evaluate"),
}
ONE_OF_EACH = tuple(stage.replace("_", "-") for stage in STAGES_OF)  # an algorithm of each stage that makes the policy
STORED = ("best_of_n", "rrhf", "iterative")  # policies that learn from answers which stage answers has sampled and scored
SAMPLING = ("ppo", "grpo", "answers", "iterative", "evaluate")  # stages that sample answers
SCORING = ("awac", *SAMPLING)  # stages that call section rewards
COURSE = ("ppo", "grpo", "iterative")  # policies whose stage leaves data/rollouts.jsonl, the answers in the course of training

# What each stage's result depends on; the graphs say the same, and a test holds them together. No round depends on how many there will be.
PARAMS_OF_STAGE = {
    "prepare": ("seed", "data", "prepare"),
    "base": ("seed", "base", "launch.precision"),
    "sft": ("seed", "sft", "launch.precision"),
    "reward": ("seed", "reward", "launch.precision"),
    "awac": ("seed", "awac", "rewards", "launch.precision"),
    "ppo": ("seed", "ppo", "rewards", "launch.precision"),
    "grpo": ("seed", "grpo", "rewards", "launch.precision"),
    "dpo": ("seed", "dpo", "launch.precision"),
    "answers": ("seed", "answers", "rewards", "launch.precision"),
    "best_of_n": ("seed", "best_of_n", "launch.precision"),
    "rrhf": ("seed", "rrhf", "launch.precision"),
    "round": ("seed", "iterative.pairs", "iterative.dpo", "launch.precision"),
    "iterative": ("seed", "answers", "rewards", "iterative.rounds", "launch.precision"),
    "evaluate": ("seed", "algorithm", "data", "evaluate", "rewards", "launch.precision"),
}
# What evaluate reads besides, by the stage that makes the policy.
PARAMS_OF_EVALUATION = {
    "ppo": ("ppo.max_prompt_tokens", "ppo.max_answer_tokens", "reward.max_tokens"),
    "grpo": ("grpo.max_prompt_tokens", "grpo.max_answer_tokens", "reward.max_tokens"),
    "dpo": ("ppo.max_prompt_tokens", "ppo.max_answer_tokens", "dpo.max_tokens", "dpo.reference"),
    **dict.fromkeys(STORED, ("answers.max_prompt_tokens", "answers.max_answer_tokens", "reward.max_tokens")),
}


def kind(stage: str) -> str:
    """What a stage is, which its module, its layout in launch.jobs and its params are named by: round for round-2."""
    return stage.partition("-")[0]


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(description="all randomness of a run derives from it")
    algorithm: algorithms.Algorithm = Field(
        description="ppo: reward model, then PPO against it; dpo: DPO on the pairs; rloo, grpo, dr-grpo, dapo, gspo, cispo, reinforce++, "
        "reinforce++-baseline, remax, opo: reward model, then stage grpo by the values of its section, into which `rlhf use PRESET "
        "algorithm=NAME` writes what the name stands for; best-of-n, rrhf: reward model, then training on answers sampled beforehand; "
        "iterative: the same in rounds; `rlhf use` sets dvc.yaml to it"
    )
    data: Data
    prepare: Prepare
    base: Base
    sft: Sft
    reward: Reward
    rewards: list[RewardEntry] = Field(min_length=1, description="what answers are scored by: the sum of weight × score is trained on")
    awac: Awac
    ppo: Ppo
    grpo: Grpo
    dpo: Dpo
    answers: Answers
    best_of_n: BestOfN
    rrhf: Rrhf
    iterative: Iterative
    evaluate: Evaluate
    promote: Promote
    operations: Operations
    feedback: Feedback
    serving: Serving
    launch: Launch
    tracking: Tracking

    @property
    def trains_reward(self) -> bool:
        """Whether there is a stage reward: its model scores the answers that the policy learns from."""
        return self.policy != "dpo" and any(entry.kind == "model" for entry in self.rewards)

    @property
    def reads_pairs(self) -> bool:
        """Whether anything is trained on preference pairs; else what a program checks is all there is to judge by."""
        return self.policy == "dpo" or self.trains_reward

    @property
    def trains_judge(self) -> bool:
        """Whether evaluate trains a second reward model: a model was trained by pairs, and there is no gold score to judge it."""
        return self.reads_pairs and not self.data.has_gold

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a run, in order."""
        found = [stage for stage in STAGES_OF[self.policy] if stage != "reward" or self.trains_reward]
        if self.warm_starts:
            found.insert(found.index(self.policy), "awac")
        if self.policy == "iterative":
            at = found.index("answers")
            found[at : at + 2] = [f"{stage}-{number}" for number in range(1, self.rounds + 1) for stage in ("answers", "round")]
        return tuple(found)

    @property
    def rounds(self) -> int:
        """How often answers are sampled before training on them."""
        return self.iterative.rounds if self.policy == "iterative" else 1

    @property
    def prompts_needed(self) -> int:
        """How many prompts there must be: a round takes none that another one has, or that is kept apart."""
        if self.policy not in STORED:
            return 1
        return self.rounds * self.answers.prompts + (self.answers.heldout_prompts if self.policy == "iterative" else 0)

    @property
    def pairs_needed(self) -> int:
        """How many prompts of preference pairs there must be, of which the same is true."""
        return self.rounds * self.answers.pairs if self.policy in STORED else 0

    @property
    def warm_starts(self) -> bool:
        """Whether stage awac comes before the policy's own."""
        return self.awac.versions > 0

    @property
    def tunes(self) -> bool:
        """Whether the policy's stage chooses values while it learns."""
        return isinstance(self.answering, Answering) and self.policy != "dpo" and self.answering.ultho is not None

    @property
    def start(self) -> str:
        """The model from which a policy that samples its own answers goes on."""
        return "models/awac" if self.warm_starts else "models/sft"

    @property
    def reward_files(self) -> list[str]:
        """The workspace's files that reward functions stand in."""
        return sorted({entry.file for entry in self.rewards if entry.kind == "function" and entry.file})

    @model_validator(mode="after")
    def _rewards(self) -> Params:
        try:
            check_rewards(self.rewards, self.algorithm, self.data)
        except ValueError as error:
            raise ValueError(f"rewards: {error}") from None
        checks = any(entry.kind != "model" and entry.right_from is not None for entry in self.rewards)
        if not (self.reads_pairs or self.data.has_gold or checks):
            raise ValueError("rewards: evaluate has nothing to judge by: give an entry right_from, the score from which an answer is right")
        return self

    @model_validator(mode="after")
    def _warm_start(self) -> Params:
        if self.warm_starts and self.policy not in ("ppo", "grpo"):
            what = f"awac.versions is {self.awac.versions}, but algorithm {self.algorithm} samples no answers for it to come before"
            raise ValueError(f"{what}: set it to 0")
        return self

    @model_validator(mode="after")
    def _every_stage_has_data(self) -> Params:
        answers = self.policy != "dpo"
        needs = {"sft": "sft needs demonstrations"}
        if self.reads_pairs:
            needs["reward"] = f"{'reward' if self.trains_reward else 'dpo'} needs preference pairs"
        elif self.policy in STORED and self.answers.pairs:
            needs["reward"] = f"answers.pairs is {self.answers.pairs}, which needs preference pairs"
        if answers:
            needs["ppo"] = f"{self.policy} needs prompts"
        if self.base.source == "build":
            needs["text"] = "base.source: build needs text to pretrain on"
        elif answers and self.answering.mixture_coefficient > 0:
            needs["text"] = f"{self.policy}.mixture_coefficient above 0 needs text"
        if self.trains_judge:
            needs["judge"] = "evaluate needs pairs for its judge, as these sources have no gold score"
        for slice_name, why in needs.items():
            if not self.data.feeding(slice_name):
                formats = ", ".join(
                    sorted({k if k != "messages" else "messages or qa" for k, v in SLICES_OF_KIND.items() if slice_name in v})
                )
                raise ValueError(f"data.sources: {why}, but no source has split.{slice_name} above 0; add a source of kind {formats}")
        heldout_kinds = {source.kind for source in self.data.feeding("heldout")}
        if self.reads_pairs and "pairs" not in heldout_kinds:
            raise ValueError("data.sources: evaluate needs held-out pairs, but no source of pairs has split.heldout above 0")
        if not heldout_kinds - {"text"}:
            raise ValueError("data.sources: evaluate needs held-out prompts, but no source of prompts has split.heldout above 0")
        if self.base.source == "build":
            pairs = self.reward.max_tokens if self.trains_reward else self.dpo.max_tokens if self.reads_pairs else 0
            longest = max(self.sft.max_tokens, pairs, self.answering.longest, self.awac.max_tokens if self.warm_starts else 0)
            if longest > self.base.context_tokens:
                raise ValueError(
                    f"base.context_tokens is {self.base.context_tokens}, but a stage uses sequences of {longest} tokens: raise it"
                )
        return self

    @model_validator(mode="after")
    def _reference_can_move(self) -> Params:
        engines = self.launch.engines
        if self.grpo.reference_every and (engines.policy.zero_stage == 3) != (engines.reference.zero_stage == 3):
            raise ValueError(
                "grpo.reference_every copies the policy into its reference: launch.engines must hold both with zero_stage 3, or neither"
            )
        return self

    @property
    def policy(self) -> str:
        """The stage that makes the policy: ppo, grpo, dpo, best_of_n, rrhf or iterative."""
        return algorithms.policy_stage(self.algorithm)

    @property
    def answering(self) -> Answering | Answers:
        """How prompts are answered: what the policy's stage says of it, and ppo after dpo."""
        found: Answering | Answers = getattr(self, self.answering_key)
        return found

    @property
    def answering_key(self) -> str:
        """The name of that section."""
        return "answers" if self.policy in STORED else "grpo" if self.policy == "grpo" else "ppo"

    def of_stage(self, stage: str) -> dict[str, Any]:
        """The values that determine a stage's result, by dotted key: what its graph lists under its params."""
        keys = PARAMS_OF_STAGE[kind(stage)] + (PARAMS_OF_EVALUATION[self.policy] if stage == "evaluate" else ())
        keys = tuple(key for key in keys if key != "reward.max_tokens" or self.trains_reward)
        return {key: _at(self.model_dump(mode="json"), key) for key in keys}


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
    return text.read(path, remedy="write it with `rlhf use sandbox`")


def validate(raw: object, origin: str) -> Params:
    """Check the parsed content of params.yaml; `origin` names it in errors."""
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        faults = error.errors()
        remedy = "see docs/params.md for every key"
        if isinstance(raw, dict) and any(e["type"] == "missing" for e in faults):
            remedy += f"; if it is of an earlier version, `rlhf use {origin} --fill PRESET` takes what is missing from a preset"
        raise UserError("; ".join(f"{origin}: {_explain(e, raw)}" for e in faults), remedy=remedy) from None


def out_of_place(raw: object) -> tuple[list[Key], list[Key]]:
    """Keys that the parsed content of params.yaml lacks, and those that it has and the schema does not."""
    try:
        Params.model_validate(raw)
    except ValidationError as error:
        found = error.errors()
    else:
        found = []
    lacking, unknown = ([_key(e, raw) for e in found if e["type"] == kind] for kind in ("missing", "extra_forbidden"))
    return lacking, unknown


def _key(error: Any, raw: object) -> Key:
    """Where an error is, without the tags of unions that pydantic puts between (rewards.0.model.weight): they lead to nothing."""
    *before, last = error["loc"] or ("",)
    key: list[str | int] = []
    for part in before:
        inner = raw.get(part) if isinstance(raw, dict) else raw[part] if isinstance(raw, list) and isinstance(part, int) else None
        if isinstance(inner, dict | list):
            key.append(part)
            raw = inner
    return (*key, last)


def _explain(error: Any, raw: object) -> str:
    key = ".".join(map(str, _key(error, raw)))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    return f"{key or 'params'}: {message}" + ("" if isinstance(error["input"], (dict, list, BaseModel)) else f", got {error['input']!r}")
