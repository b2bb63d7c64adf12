"""Section rewards: what the answers are scored by, while ppo trains and when it is evaluated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, PositiveInt, field_validator, model_validator

from rlhf.config.data import Data
from rlhf.config.section import Fraction, Positive, Section, Slug
from rlhf.redact import holds_password

# Those of rlhf/rewards/functions.py.
BUILT_IN = ("choice", "instructions", "json", "length", "match", "math", "pattern", "repetition")
_IN_FILE = re.compile(r"(?!/)[^:\0]+\.py:[A-Za-z_]\w*")


def _is_function(text: str) -> str:
    if text not in BUILT_IN and (not _IN_FILE.fullmatch(text) or ".." in text.rpartition(":")[0].split("/")):
        raise ValueError(f"give FILE.py:NAME, a file below the workspace and a function in it, or one of {', '.join(BUILT_IN)}")
    return text


class ModelReward(Section):
    """The score of stage reward's model, less its mean on held-out answers, divided by their spread."""

    name: Slug = Field(description="name of the entry in logs and metrics")
    kind: Literal["model"]
    weight: float = Field(description="the sum of weight × score is trained on; 0: logged alone")


class _Checked(Section):
    name: Slug = Field(description="name of the entry in logs and metrics")
    weight: float = Field(description="the sum of weight × score is trained on; 0: logged alone")
    sources: list[str] | None = Field(description="answers to prompts of these sources (data.sources) are scored, others get 0; null: all")
    right_from: float | None = Field(
        description="an answer with this score or more is right: evaluate reports accuracy, and the gates look at it; null: it says "
        "nothing of that"
    )
    seconds: Positive = Field(description="time limit: function, of one call; http, of one request")
    failure_score: float = Field(description="score of an answer for which it fails, or gives no number in time")
    max_failed_share: Fraction = Field(description="a step in which it fails on a larger share of the answers ends the stage")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.sources == []:
            raise ValueError(f"entry '{self.name}': sources is empty, so that it scores nothing: name one, or set it to null for all")
        if self.right_from is not None and self.failure_score >= self.right_from:
            raise ValueError(
                f"entry '{self.name}': failure_score {self.failure_score:g} is not below right_from {self.right_from:g}, so that an answer "
                "for which it fails would be right: lower failure_score"
            )
        return self


class FunctionReward(_Checked):
    """A Python function, called in processes of its own."""

    kind: Literal["function"]
    function: Annotated[str, AfterValidator(_is_function)] = Field(
        description="FILE.py:NAME, a function in a file of the workspace; or a built-in one: " + ", ".join(BUILT_IN)
    )
    options: dict[str, JsonValue] = Field(
        description="further arguments of the function, by name; docs/rewards.md has those of each built-in one"
    )

    @property
    def file(self) -> str | None:
        """The workspace's file that it stands in; None where it is built in."""
        return None if self.function in BUILT_IN else self.function.rpartition(":")[0]


class HttpReward(_Checked):
    """A service that takes a batch of answers as JSON."""

    kind: Literal["http"]
    url: str = Field(
        description="where each batch is posted; a token in the environment, RLHF_REWARD_TOKEN, goes along as `Authorization: Bearer`"
    )
    batch_size: PositiveInt = Field(description="at most so many answers are sent in one request")
    retries: Annotated[int, Field(ge=0)] = Field(
        description="a request that found no service, or was answered too late, or with status 429 or 5xx, is sent so many times more"
    )

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("it is to begin with http:// or https://")
        if holds_password(url):
            raise ValueError("url holds a password: give it in the environment, as RLHF_REWARD_TOKEN")
        return url


CheckedReward = FunctionReward | HttpReward
RewardEntry = Annotated[ModelReward | FunctionReward | HttpReward, Field(discriminator="kind")]


def check_rewards(entries: Sequence[RewardEntry], algorithm: str, data: Data) -> None:
    """Check the entries together.

    Raises:
        ValueError: two have one name or are models, one names no source, nothing is trained on, or the algorithm needs a model.
    """
    names = [entry.name for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two entries are named '{twice[0]}': give each its own name")
    models = [entry.name for entry in entries if entry.kind == "model"]
    if len(models) > 1:
        raise ValueError(f"entries {' and '.join(models)} are of kind model, but stage reward trains one: take one out")
    if algorithm == "ppo" and not models:
        raise ValueError("ppo needs an entry of kind model, as its critic begins as the reward model: add one, or take another algorithm")
    if algorithm != "dpo" and not any(entry.weight for entry in entries):
        raise ValueError("every weight is 0, so that nothing would be trained on")
    known = [source.name for source in data.sources if source.kind == "verifiable"]
    for entry in entries:
        unknown = [] if isinstance(entry, ModelReward) else [name for name in entry.sources or () if name not in known]
        if unknown:
            there = ", ".join(known) or "there is none"
            raise ValueError(f"entry '{entry.name}' names source '{unknown[0]}', which is none of kind verifiable ({there})")
