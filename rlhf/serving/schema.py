"""What replies look like, for the OpenAPI document: nothing is made from these classes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Error(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: Error


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ToldToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogProbs(BaseModel):
    content: list[ToldToken]
    refusal: None


class Said(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogProbs | None
    finish_reason: Literal["stop", "length"]


class TextLogProbs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogProbs | None
    finish_reason: Literal["stop", "length"]


class Reply(BaseModel):
    id: str
    created: int
    model: str  # the version
    system_fingerprint: str
    usage: Usage


class ChatReply(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextReply(Reply):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ListedModel(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str


class ModelsReply(BaseModel):
    object: Literal["list"]
    data: list[ListedModel]


class HealthReply(BaseModel):
    """To who brings no key where one is asked for, the status alone."""

    status: str
    versions: dict[str, str] = {}
    problems: dict[str, str] = {}
    warnings: dict[str, str] = {}


Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    "4XX": {"model": ErrorReply, "description": "What was asked cannot be answered."},
    "5XX": {"model": ErrorReply, "description": "It was not answered, through no fault of the request."},
}
HEALTH: Responses = {
    200: {"model": HealthReply, "description": "A version is served."},
    503: {"model": HealthReply, "description": "No version is served yet."},
}


def answered(reply: type[Reply]) -> Responses:
    """A reply as a whole, or in a stream."""
    events = {"schema": {"type": "string", "description": "server-sent events, the last one `[DONE]`"}}
    return {200: {"model": reply, "description": "The answers.", "content": {"text/event-stream": events}}}
