"""Hyperparameters that are chosen while a stage learns: `ultho` of sections ppo and grpo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, PositiveInt

from rlhf.config.section import NonNegative, Section

FACTOR = "learning_rate_factor"
KL = "kl_coefficient"
# what may change between two steps; a cluster has the name of its key
CLUSTERS = ("policy_clip", "value_clip", "entropy_coefficient", KL, "epochs", "gae_lambda", "mixture_coefficient", FACTOR)
Value = int | float | Annotated[tuple[float, float], Field(strict=False)]
AnySection = TypeVar("AnySection", bound=Section)


class Ultho(Section):
    """Hyperparameters chosen by a bandit while the stage learns (ULTHO, arXiv 2503.06101)."""

    clusters: dict[str, Annotated[list[Value], Field(min_length=2)]] = Field(
        min_length=1,
        description=f"values to choose among, by key: {', '.join(CLUSTERS)}. The first one is that of the section; kl_coefficient is "
        "kl.coefficient, and learning_rate_factor, which begins with 1, multiplies the actor's learning rate",
    )
    kl_weight: NonNegative = Field(
        description="what is to be high is the mean reward less so many times the KL of an answer, whatever kl.coefficient is then"
    )
    window: PositiveInt = Field(description="W: so many of the last gains of a value count")
    exploration: NonNegative = Field(
        description="c: how much a value that was chosen rarely is preferred, in standard deviations of the reward's noise; at 1 what went "
        "badly once is never tried again, at 3 it is"
    )


def applied(section: AnySection, chosen: Mapping[str, Any]) -> AnySection:
    """The section with other values, by the names of their clusters.

    Raises:
        pydantic.ValidationError: they are out of bounds, or do not go together.
    """
    raw = section.model_dump() | {"ultho": None}
    for name, value in chosen.items():
        if name != FACTOR:
            (raw["kl"] if name == KL else raw)[_key(name)] = value
    return type(section).model_validate(raw)


def _key(name: str) -> str:
    return "coefficient" if name == KL else name


def check(section: Any) -> None:
    """Check that each value can stand in the section, and that the first one does.

    Raises:
        ValueError: names the cluster and the value.
    """
    if section.ultho.kl_weight and not getattr(section, "holds_reference", True):
        raise ValueError("ultho.kl_weight: without a reference the KL is not measured: set it to 0, or kl.coefficient above 0")
    for name, values in section.ultho.clusters.items():
        where = f"ultho.clusters.{name}"
        known = [one for one in CLUSTERS if one in (KL, FACTOR, *type(section).model_fields)]
        if name not in known:
            raise ValueError(f"{where}: nothing of that name is chosen here: {', '.join(known)}")
        if values[0] != (now := 1.0 if name == FACTOR else getattr(section.kl if name == KL else section, _key(name))):
            raise ValueError(f"{where} begins with {values[0]}, but the run with {now}: put that first")
        if len(set(values)) < len(values):
            raise ValueError(f"{where} has a value twice")
        if name == KL and (min(values) <= 0 or getattr(section.kl, "controller", "fixed") == "adaptive"):
            raise ValueError(f"{where}: a KL of weight 0 is not always measured, and an adaptive controller sets β itself")
        if name == FACTOR and min(values) <= 0:
            raise ValueError(f"{where}: give factors above 0")
        for value in values:
            try:
                applied(section, {name: value})
            except ValueError as error:
                reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)  # of pydantic
                raise ValueError(f"{where}: {value} cannot stand here: {reason.removeprefix('Value error, ')}") from None
