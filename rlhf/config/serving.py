"""Section serving: the assistant's own server."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rlhf.config.section import Fraction, PathText, Positive, Section, Slug
from rlhf.redact import holds_password

Role = Literal["ask", "rate", "administer"]
ROLES: tuple[Role, ...] = ("ask", "rate", "administer")


class Key(Section):
    """A key of the server, by its name: it stands in the environment or in a file, never in params.yaml."""

    name: Slug = Field(description="of whoever has it; answers and ratings are recorded with it")
    roles: Annotated[list[Role], Field(min_length=1)] = Field(
        description="ask: answers; rate: the page of ratings; administer: /metrics, /figures, and which arm of the traffic answers"
    )
    variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        description="variable of the environment that holds the key; null: it is in file"
    )
    file: PathText | None = Field(description="file that holds the key, with mode 600; null: it is in variable")
    requests_per_minute: PositiveInt | None = Field(description="that are taken, and at once after a pause; null: any number")
    max_body_kib: PositiveInt | None = Field(description="size of the largest request with this key, in KiB; null: serving.max_body_kib")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.variable is None) == (self.file is None):
            raise ValueError(f"key {self.name} is to be in variable or in file, and the other one null")
        return self


class Traffic(Section):
    """What the candidate answers, beside the champion."""

    candidate: Fraction = Field(
        description="share of the conversations that the candidate answers where no alias or version is named; 0: none, 1: all"
    )
    shadow: Fraction = Field(
        description="share of the champion's recorded answers beside which the candidate writes one that nobody sees: a pair to be rated"
    )


class Serving(Section):
    """The assistant's own server (`rlhf serve`): where it listens, and how much it takes."""

    host: str = Field(description="address that it listens at; 127.0.0.1: programs of this machine alone; another one needs keys")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(description="port that it listens at; 0: a free one")
    aliases: Annotated[list[Slug], Field(min_length=1)] = Field(
        description="versions with these aliases are held ready; who names none gets the first one of them that there is"
    )
    more_versions: Annotated[int, Field(ge=0)] = Field(
        description="versions without such an alias, asked for by their numbers, that are held ready besides at most; 0: none is served"
    )
    refresh_seconds: Positive = Field(description="how often the registry is asked where the aliases point")
    slots: PositiveInt = Field(description="answers that each version writes at a time")
    queue: PositiveInt = Field(description="requests that wait for a slot at most; further ones are refused (429)")
    seconds: Positive = Field(description="an answer that takes longer, waiting included, is given up")
    max_prompt_tokens: PositiveInt = Field(description="tokens of the longest dialogue that is taken; less where the model takes less")
    max_tokens: PositiveInt = Field(description="tokens of the longest answer, and of one for which no limit is asked")
    max_body_kib: PositiveInt = Field(description="size of the largest request, in KiB")
    threads: PositiveInt = Field(description="CPU threads that each version computes on; for a tiny model one is best")
    # not by its own name: what has keys is a mapping to dict(), by which Prefect looks through what a task is given
    named_keys: list[Key] = Field(alias="keys", description="who may use it; empty: every program of this machine, without a key")
    traffic: Traffic
    keep: Literal["none", "consented", "all"] = Field(
        description="which answers are recorded, with what was asked: none; those whose request says store: true; all but those whose "
        "request says store: false"
    )
    keep_days: PositiveInt | None = Field(
        description="days after which a recorded answer is deleted, unless it is in a pair or an application spoke of it; null: never"
    )
    database: str | None = Field(
        description="address of the PostgreSQL database that answers and ratings are recorded in (postgresql://USER@HOST/DATABASE); null: "
        "feedback/feedback.db in the workspace; RLHF_DATABASE_URL in the environment goes first"
    )

    @property
    def asks_for(self) -> str:
        """What a client needs, in words."""
        names = ", ".join(key.name for key in self.named_keys)
        return f"a key is asked for: {names}" if names else "no key is asked for: every program of this machine may use it"

    @model_validator(mode="after")
    def _each_key_once(self) -> Self:
        names = [key.name for key in self.named_keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"keys: {', '.join(twice)} is there twice")
        return self

    @model_validator(mode="after")
    def _arms(self) -> Self:
        asked = [name for name in ("candidate", "shadow") if getattr(self.traffic, name)]
        if asked and not {"champion", "candidate"} <= set(self.aliases):
            raise ValueError(f"traffic.{asked[0]} needs champion and candidate among aliases")
        if self.traffic.shadow and self.keep == "none":
            raise ValueError("traffic.shadow needs answers that are recorded, but keep is none")
        return self

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        # params.yaml is committed, and stored with each version
        if self.database is not None and holds_password(self.database):
            raise ValueError("database holds a password: give such an address in the environment, as RLHF_DATABASE_URL")
        return self
