"""Section serving: the assistant's own server."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rlhf.config.section import Positive, Section, Slug
from rlhf.redact import holds_password


class Serving(Section):
    """The assistant's own server (`rlhf serve`): where it listens, and how much it takes."""

    host: str = Field(description="address that it listens at; 127.0.0.1: programs of this machine alone")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(description="port that it listens at; 0: a free one")
    aliases: Annotated[list[Slug], Field(min_length=1)] = Field(
        description="versions with these aliases are held ready; who names none gets the first one of them that there is"
    )
    refresh_seconds: Positive = Field(description="how often the registry is asked where the aliases point")
    slots: PositiveInt = Field(description="answers that each version writes at a time")
    queue: PositiveInt = Field(description="requests that wait for a slot at most; further ones are refused (429)")
    seconds: Positive = Field(description="an answer that takes longer, waiting included, is given up")
    max_prompt_tokens: PositiveInt = Field(description="tokens of the longest dialogue that is taken; less where the model takes less")
    max_tokens: PositiveInt = Field(description="tokens of the longest answer, and of one for which no limit is asked")
    max_body_kib: PositiveInt = Field(description="size of the largest request, in KiB")
    threads: PositiveInt = Field(description="CPU threads that each version computes on")
    keep: Literal["none", "consented", "all"] = Field(
        description="which answers are recorded, with what was asked: none; those whose request says store: true; all but those whose "
        "request says store: false"
    )
    database: str | None = Field(
        description="address of the PostgreSQL database that answers and ratings are recorded in (postgresql://USER@HOST/DATABASE); null: "
        "feedback/feedback.db in the workspace; RLHF_DATABASE_URL in the environment goes first"
    )

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        # params.yaml is committed, and stored with each version
        if self.database is not None and holds_password(self.database):
            raise ValueError("database holds a password: give such an address in the environment, as RLHF_DATABASE_URL")
        return self
