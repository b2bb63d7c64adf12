"""What clients may send, as OpenAI's interface has it. A field that would not be heeded is refused, unless its value asks for nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_CHOICES = 16
MOST_PROMPTS = 64
FIRST = Field(fail_fast=True)  # of a list: a body of half a million wrong elements must not become as many errors, which take gigabytes
Nothing = Annotated[float, Field(ge=0, le=0)] | None
Empty = Annotated[list[Any], Field(max_length=0)] | None


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character (a lone surrogate)") from None
    return text


Words = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Words, Field(min_length=1, max_length=100)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(Body):
    type: Literal["text"]
    text: Words


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], FIRST]
    # so that an answer can be sent again as it came
    refusal: None = None
    audio: None = None
    function_call: None = None
    name: None = None
    annotations: Empty = None
    tool_calls: Empty = None

    @property
    def plain(self) -> dict[str, str]:
        """As the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Metadata(Body):
    conversation: Annotated[Words, Field(min_length=1, max_length=200)] | None = None


class Asked(Body, ABC):
    """What chat and completions have in common."""

    model: Words
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4), FIRST] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[Words, Field(min_length=1, max_length=200)] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @field_validator("stream_options")
    @classmethod
    def _streams(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value and not info.data.get("stream"):
            raise ValueError("stream_options is for stream: true alone")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def conversation(self) -> str | None:
        return self.metadata.conversation if self.metadata else None

    @property
    @abstractmethod
    def top(self) -> int | None:
        """Likeliest tokens to tell beside each one; None: no log-probabilities at all."""


class TextFormat(Body):
    type: Literal["text"]


class ChatBody(Asked):
    messages: Annotated[list[Message], Field(min_length=1), FIRST]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Empty = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _asks_for_an_answer(self) -> ChatBody:
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last one must be the user's")
        if self.messages[0].role == "assistant":
            raise ValueError("messages: the first one must not be the assistant's")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true alone")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


Passage = Annotated[Words, Field(min_length=1)]
Number = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Number], Field(min_length=1), FIRST]

Several = Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)


class CompletionBody(Asked):
    prompt: Passage | Tokens | Annotated[list[Passage], Several] | Annotated[list[Tokens], Several]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each a text or token ids."""
        first = self.prompt[0] if isinstance(self.prompt, list) else None
        return cast(Any, self.prompt if isinstance(first, str | list) else [self.prompt])

    @property
    def top(self) -> int | None:
        return self.logprobs
