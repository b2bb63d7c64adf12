"""Section feedback: how answers are rated, and when ratings become data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from rlhf.config.section import Fraction, Positive, Section


class Feedback(Section):
    """Ratings of answers: what a rater is shown (`/rate` of the assistant's server), and when `rlhf ingest --feedback` takes them."""

    ratings: PositiveInt = Field(description="raters that each pair is shown to; then it is complete, and may become data")
    gold_share: Fraction = Field(description="share of what a rater is shown whose right verdict is known (`rlhf feedback gold`)")
    repeat_share: Fraction = Field(description="share of what a rater is shown that they rated before, with the sides exchanged")
    min_agreement: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        description="Krippendorff's alpha of new ratings below which `rlhf ingest --feedback` refuses them; null: it is not looked at"
    )
    ingest_ratings: PositiveInt | None = Field(
        description="so many new ratings of complete pairs have the assistant's server ingest them; null: no number does"
    )
    ingest_hours: Positive | None = Field(
        description="it also ingests what new ratings there are so many hours after the last time; null: it does not"
    )
