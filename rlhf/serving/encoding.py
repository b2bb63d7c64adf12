"""What a client sent, as an engine is asked it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from rlhf.errors import UserError
from rlhf.models.contents import encode_passages
from rlhf.models.dialogues import encode_prompt
from rlhf.serving.bodies import Asked, ChatBody, CompletionBody
from rlhf.serving.replies import RefusedError
from rlhf.serving.requests import Request
from rlhf.serving.versions import Version, Versions


def encoded(versions: Versions, version: Version, body: Asked) -> list[Request]:
    """What is asked of the engine, one request for each prompt, with a seed where there is none.

    Args:
        versions: of the server.
        version: that is to answer.
        body: what the client sent.

    Raises:
        RefusedError: the version cannot answer it.
    """
    settings, engine = versions.settings, version.engine
    room = min(settings.max_prompt_tokens, engine.capacity - 1)
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    if isinstance(body, ChatBody) and len(body.messages) > room:
        raise _too_long(len(body.messages), room, param)  # each takes a token at least
    try:
        prompts = _tokens(engine.tokenizer, body)
    except UserError as error:
        raise RefusedError(400, error.what, "invalid_messages", param) from None
    if len(prompts) > settings.queue:  # else it would be told to come again, for ever
        raise RefusedError(400, f"prompt: {len(prompts)} are more than may wait at a time (serving.queue is {settings.queue})", None, param)
    for prompt in prompts:
        if not 0 < len(prompt) <= room:
            raise _too_long(len(prompt), room, param)
        if max(prompt) >= len(engine.tokenizer):
            raise RefusedError(400, f"prompt: {max(prompt)} is no token of the model", "invalid_value", param)
    if body.limit and body.limit > settings.max_tokens:
        raise RefusedError(
            400, f"max_tokens: {body.limit} is more than {settings.max_tokens}, which serving.max_tokens allows", None, "max_tokens"
        )
    first = Request(
        prompt=(),
        max_tokens=body.limit or settings.max_tokens,
        seed=random.getrandbits(62) if body.seed is None else body.seed % 2**63,
        seconds=settings.seconds,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        stops=body.stops,
        choices=body.n or 1,
        top=body.top,
    )
    return [replace(first, prompt=tuple(prompt)) for prompt in prompts]


def _tokens(tokenizer: Any, body: Asked) -> list[list[int]]:
    if isinstance(body, ChatBody):
        return [encode_prompt(tokenizer, [message.plain for message in body.messages])]
    assert isinstance(body, CompletionBody)
    return [encode_passages(tokenizer, [prompt])[0] if isinstance(prompt, str) else prompt for prompt in body.prompts]


def _too_long(tokens: int, room: int, param: str) -> RefusedError:
    return RefusedError(400, f"{param}: {tokens} tokens at least, but the model takes {room}", "context_length_exceeded", param)
