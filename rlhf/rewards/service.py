"""Rewards from a service: batches of answers posted as JSON, each answered by as many numbers."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from rlhf.config.rewards import HttpReward

AT_A_TIME = 4  # requests
LONGEST_PAUSE = 30.0  # seconds before another try
LARGEST_REPLY = 16 << 20  # bytes
TOKEN = "RLHF_REWARD_TOKEN"  # environment variable


class Refused(Exception):  # noqa: N818 - it becomes a counted score
    """What a service did wrong. `again`: another try may help."""

    def __init__(self, what: str, *, again: bool) -> None:
        self.again = again
        super().__init__(what)


def scores(entry: HttpReward, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the service says of each answer, in their order: `score`, or `error`, why it gave none."""
    token = os.environ.get(TOKEN, "").strip()  # a mounted secret often ends with a newline
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    batches = [asked[first : first + entry.batch_size] for first in range(0, len(asked), entry.batch_size)]
    with httpx.Client(headers=headers, timeout=entry.seconds) as client, ThreadPoolExecutor(AT_A_TIME) as threads:
        return [row for rows in threads.map(lambda batch: _batch(client, entry, batch), batches) for row in rows]


def _batch(client: httpx.Client, entry: HttpReward, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    for attempt in range(entry.retries + 1):
        try:
            return [_score(value) for value in _numbers(_post(client, entry, asked), len(asked))]
        except Refused as refusal:
            why = str(refusal)
            if not refusal.again:
                break
            if attempt < entry.retries:
                time.sleep(min(LONGEST_PAUSE, 2.0**attempt))
    return [{"error": why} for _ in asked]


def _post(client: httpx.Client, entry: HttpReward, asked: Sequence[Mapping[str, Any]]) -> bytes:
    """The body of a reply; the time limit is that of all of it, however slowly it comes."""
    content = json.dumps({"rows": list(asked)}).encode()  # a column may hold NaN, of which httpx's own encoder makes an error
    deadline = time.monotonic() + entry.seconds
    body = bytearray()
    try:
        with client.stream("POST", entry.url, content=content) as reply:
            if reply.status_code != httpx.codes.OK:
                again = reply.status_code == httpx.codes.TOO_MANY_REQUESTS or reply.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
                raise Refused(f"{entry.url} answered with status {reply.status_code}", again=again)
            for part in reply.iter_bytes():
                body += part
                if time.monotonic() > deadline:
                    raise Refused(f"{entry.url} took longer than {entry.seconds:g} s (seconds)", again=True)
                if len(body) > LARGEST_REPLY:
                    raise Refused(f"{entry.url} answered with more than {LARGEST_REPLY} bytes", again=False)
    except httpx.TimeoutException:
        raise Refused(f"{entry.url} took longer than {entry.seconds:g} s (seconds)", again=True) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refused(f"{entry.url} cannot be reached: {error or type(error).__name__}", again=True) from None
    return bytes(body)


def _numbers(body: bytes, count: int) -> list[Any]:
    try:
        content = json.loads(body)
        found = content["scores"] if isinstance(content, dict) else content
        if not isinstance(found, list):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(f'its reply {body[:100]!r} is not {{"scores": [number, …]}}', again=False) from None
    if len(found) != count:
        raise Refused(f"it gave {len(found)} scores for {count} answers", again=False)
    return found


def _score(value: Any) -> dict[str, Any]:
    with suppress(OverflowError):  # JSON has integers of any length
        if isinstance(value, int | float) and math.isfinite(value):
            return {"score": float(value)}
    return {"error": f"it gave {value!r:.200}, and is to give a number"}
