"""The schema of a sweep's file: which values are tried, how many points, and what is wanted of them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from rlhf import config
from rlhf.config.section import Section
from rlhf.errors import UserError

# what metrics/summary.json may hold, and what is wanted of it where a sweep says nothing else
NUMBERS = {
    "accuracy": "maximize",
    "accuracy_difference_low": "maximize",
    "gold": "maximize",
    "gold_difference": "maximize",
    "gold_difference_low": "maximize",
    "win_rate": "maximize",
    "win_rate_low": "maximize",
    "win_rate_length_controlled": "maximize",
    "reward_accuracy": "maximize",
    "reward_calibration_error": "minimize",
    "kl": "minimize",
    "perplexity_ratio": "minimize",
    "eos_rate": "maximize",
    "answer_tokens": "minimize",
    "refusals": "minimize",
    "repetitions": "minimize",
}
OF_GOLD, OF_PROGRAMS = ("gold", "gold_difference", "gold_difference_low"), ("accuracy", "accuracy_difference_low")
TAGS = ("list", "range")
DOCUMENTED = "docs/sweeps.md has an example of each method"
Number = int | float
Values = dict[str, Any]
Direction = Literal["maximize", "minimize"]


class Range(Section):
    """Numbers between two ends, both of which may come."""

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None

    @model_validator(mode="after")
    def _ends(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: true needs low above 0, and no step")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step {self.step} is not above 0")
        if self.step is not None and not math.isclose(times := (self.high - self.low) / self.step, round(times), rel_tol=1e-9):
            raise ValueError(f"steps of {self.step} from low {self.low} do not come to high {self.high}")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers come."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step) if value is not None)


Choices = Annotated[list[Any], Field(min_length=1)]
Dimension = Annotated[
    Annotated[Choices, Tag("list")] | Annotated[Range, Tag("range")],
    Discriminator(
        lambda value: "list" if isinstance(value, list) else "range" if isinstance(value, dict | Range) else None,
        custom_error_type="neither",
        custom_error_message="a list of values is wanted, or a range with low and high",
    ),
]


class Space(Section):
    """The whole of a sweep's file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
    method: Literal["grid", "random", "tpe"]
    points: Annotated[int, Field(ge=1, le=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    batch: Annotated[int, Field(ge=1)] = 1
    values: Annotated[dict[str, Dimension], Field(min_length=1)]
    fixed: dict[str, Any] = Field(default_factory=dict)
    objectives: dict[str, Direction] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Space:
        for key, choices in self.values.items():
            if isinstance(choices, Range):
                if self.method == "grid":
                    raise ValueError(f"values.{key} is a range, and a grid needs a list of values: give one, or method: random or tpe")
            elif len({_text(f"values.{key}", choice) for choice in choices}) < len(choices):
                raise ValueError(f"values.{key} holds a value twice")
        for key, value in self.fixed.items():
            _text(f"fixed.{key}", value)
        if both := sorted(self.values.keys() & self.fixed.keys()):
            raise ValueError(f"fixed.{both[0]} stands under values, too")
        if unknown := sorted(self.objectives.keys() - NUMBERS.keys()):
            raise ValueError(f"objectives.{unknown[0]} is no number of metrics/summary.json: one of {', '.join(NUMBERS)}")
        if self.method == "grid" and (size := math.prod(len(self.grid_values(key)) for key in self.values)) > self.points:
            raise ValueError(f"points is {self.points}, but the grid has {size}: raise it, or take values out")
        return self

    def grid_values(self, key: str) -> list[Any]:
        """The values of a key; of a range both ends."""
        found = self.values[key]
        return [found.low, found.high] if isinstance(found, Range) else found

    def grid(self) -> list[Values]:
        """Every combination, the last key changing first."""
        keys = list(self.values)
        return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*(self.grid_values(key) for key in keys))]

    def corners(self) -> list[Values]:
        """Each value, and each end of a range, once, beside the first one of every other key."""
        first = {key: self.grid_values(key)[0] for key in self.values}
        return [first | {key: value} for key in self.values for value in self.grid_values(key)]

    def overrides(self, values: Values) -> list[str]:
        """The changes to params.yaml that make a point; a new algorithm comes first, as it sets other values."""
        changes = self.fixed | values
        order = sorted(changes, key=lambda key: key != "algorithm")
        return [f"{key}={_text(key, changes[key])}" for key in order]

    def wanted(self, params: config.Params) -> dict[str, Direction]:
        """What is wanted of a point; where the file does not say: answers that are better, near to where the policy began.

        Raises:
            ValueError: an objective that the data of these params cannot give.
        """
        checks = any(entry.kind != "model" and entry.right_from is not None for entry in params.rewards)
        for key in self.objectives:
            if (key in OF_GOLD and not params.data.has_gold) or (key in OF_PROGRAMS and not checks):
                raise ValueError(f"objectives.{key}: these data and rewards have no {'gold score' if key in OF_GOLD else 'right answers'}")
        first = "accuracy" if checks else "gold" if params.data.has_gold else "win_rate"
        return self.objectives or {first: "maximize", "kl": "minimize"}


def _text(key: str, value: Any) -> str:
    """A value as `rlhf use` takes it.

    Raises:
        ValueError: YAML has a tag for it, params.yaml has none.
    """
    try:
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    except TypeError:
        raise ValueError(f"{key}: {value!r:.100} is no value of params.yaml: numbers, texts, lists and maps are") from None


def load(path: Path) -> Space:
    """Read and check a sweep's file.

    Raises:
        UserError: it is missing, or no YAML, or a key is missing, unknown or wrong; names file and key.
    """
    try:
        raw = config.text.read(path, remedy="")
    except UserError as error:
        raise UserError(error.what, remedy=f"give the path of a sweep's file, or correct that; {DOCUMENTED}") from None
    try:
        return Space.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(f"{path}: {_explain(one)}" for one in error.errors()), remedy=DOCUMENTED) from None


def _explain(error: Any) -> str:
    # the tag of what stands under `values` is no key of the file
    key = ".".join(str(part) for number, part in enumerate(error["loc"]) if not (part in TAGS and number == 2))
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    is_map = error["type"] in ("model_type", "dict_type")
    said = "keys with their values are wanted" if is_map else error["msg"].removeprefix("Value error, ")
    return f"{key}: {said}" if key else said
