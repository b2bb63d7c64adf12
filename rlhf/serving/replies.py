"""Replies in OpenAI's form: whole ones, chunks of a stream, errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.serving.requests import Token
from rlhf.serving.versions import Version

Json = dict[str, Any]
MOST = 500  # characters of a message
# JSON may hold them as they are, but clients that read lines as Python's str.splitlines cuts them would cut a text there
ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


class RefusedError(Exception):
    """A request is answered with an error."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(_short(message))
        self.status, self.code, self.param = status, code, param and _short(param)
        self.headers = dict(headers or {})

    @property
    def content(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _short(text: str) -> str:
    """What may repeat something that a client sent: not all of it, and no half of a character."""
    return text[:MOST].encode(errors="replace").decode()


def line(content: Mapping[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':')).translate(ENDS)}\n\n"


def usage(prompt: int, answer: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Form:
    """How replies of one request look.

    Args:
        chat: whether messages are exchanged, and not texts.
        version: that answers.
        number: of the request.
        created: seconds.
    """

    def __init__(self, chat: bool, version: Version, number: str, created: int) -> None:
        self.chat, self._tokenizer = chat, version.engine.tokenizer
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{number}"
        self._head = {
            "id": self.id,
            "created": created,
            "model": version.name,
            "system_fingerprint": version.fingerprint,
        }

    def whole(self, choices: Sequence[Json], used: Json) -> Json:
        return self._head | {"object": "chat.completion" if self.chat else "text_completion", "choices": choices, "usage": used}

    def choice(self, index: int, text: str, tokens: Sequence[Token] | None, finish: str) -> Json:
        said: Json = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return said | {"index": index, "logprobs": self._log_probs(tokens), "finish_reason": finish}

    def chunk(self, index: int, delta: Json, tokens: Sequence[Token] | None = None, finish: str | None = None) -> Json:
        said: Json = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return self.chunk_of([said | {"index": index, "logprobs": self._log_probs(tokens), "finish_reason": finish}])

    def chunk_of(self, choices: Sequence[Json], used: Json | None = None) -> Json:
        more = {} if used is None else {"usage": used}
        return self._head | {"object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices} | more

    def _log_probs(self, tokens: Sequence[Token] | None) -> Json | None:
        if tokens is None:
            return None
        if not self.chat:
            return {
                "tokens": [self._text(token.number) for token in tokens],
                "token_logprobs": [token.log_prob for token in tokens],
                "top_logprobs": [{self._text(number): value for number, value in token.top} for token in tokens],
                "text_offset": [token.start for token in tokens],
            }
        told = [
            self._of(token.number, token.log_prob) | {"top_logprobs": [self._of(number, value) for number, value in token.top]}
            for token in tokens
        ]
        return {"content": told, "refusal": None}

    def _of(self, number: int, log_prob: float) -> Json:
        text = self._text(number)
        return {"token": text, "logprob": log_prob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, number: int) -> str:
        return str(self._tokenizer.decode([number]))
