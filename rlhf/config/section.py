"""What the sections of params.yaml are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
# below it logits that are divided by it overflow
Temperature = Annotated[float, Field(ge=0.001)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


def _can_be_a_path(text: str) -> str:
    # a system would not even say that there is no such file
    if not text.strip() or len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("it is empty, or longer than a path can be")
    return text


PathText = Annotated[str, AfterValidator(_can_be_a_path)]


class Section(BaseModel):
    # strict: a word for a number, or a number for yes, is a slip, and no value is changed in silence
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)
