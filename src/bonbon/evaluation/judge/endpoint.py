"""The endpoint of a judge: whether it may be asked, one request to it, and what it says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from bonbon.config.evaluation import JudgeConfig
from bonbon.remote.endpoints import (
    checked_endpoint,
    is_passing,
    message_text,
    retry_after_seconds,
    server_message,
)
from bonbon.system.errors import BonbonError

_LONGEST_RETRY_AFTER = 600.0  # seconds that a server may ask for
_OF_ONE_REQUEST = {400, 413, 422}


class NoReplyError(Exception):
    """A request failed in passing; the server asked for a pause of `retry_after` seconds."""

    def __init__(self, why: str, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Judge:
    """An endpoint, and what the workers that ask it share."""

    config: JudgeConfig
    client: httpx.Client
    secret: str = field(repr=False)
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def connected(config: JudgeConfig) -> Iterator[Judge]:
    """A judge that may be asked. Raises BonbonError when its address or the key cannot be used."""
    endpoint = checked_endpoint(config.base_url, config.api_key_env, "judge")
    limits = httpx.Limits(
        max_connections=config.concurrency, max_keepalive_connections=config.concurrency
    )
    # A proxy named by the environment would read what is meant to stay on this machine.
    with httpx.Client(
        headers=endpoint.headers(),
        timeout=config.client.timeout,
        limits=limits,
        trust_env=not endpoint.local,
    ) as client:
        yield Judge(config, client, endpoint.secret)


def url_of(config: JudgeConfig) -> str:
    """Return where requests go."""
    return f"{config.base_url.rstrip('/')}/chat/completions"


class RefusedError(BonbonError):
    """The endpoint does not want this one request: too long for it, or filtered."""


def ask(judge: Judge, body: bytes, prompt_id: str) -> tuple[str, bool]:
    """The reply to one request, and whether it came to its own end.

    A reply that was cut at its limit of tokens never reached its last line. Raises NoReplyError
    where it is worth another try, RefusedError for what may be this request's fault alone, else
    BonbonError.
    """
    try:
        status, retry_after, content = _post(judge, body)
    except httpx.RequestError as error:
        raise NoReplyError(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
    if is_passing(status):
        raise NoReplyError(f"status {status}: {server_message(content, judge.secret)}", retry_after)
    if status >= 300:
        raise _refusal(judge, status, content, prompt_id)
    try:
        choice = json.loads(content)["choices"][0]
        is_whole = choice.get("finish_reason") != "length"
        return message_text(choice["message"].get("content")), is_whole
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise NoReplyError(
            f"status {status} without a reply: {server_message(content, judge.secret)}"
        ) from error


def _post(judge: Judge, body: bytes) -> tuple[int, float, bytes]:
    """Status, seconds to wait before the next try, and content of the response."""
    deadline = time.monotonic() + judge.config.client.timeout
    content = b""
    with judge.client.stream("POST", url_of(judge.config), content=body) as response:
        for chunk in response.iter_bytes():
            content += chunk
            # The client's own timeout is one between two chunks.
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the reply took too long")
    seconds = retry_after_seconds(response.headers.get("Retry-After", ""))
    return response.status_code, min(seconds, _LONGEST_RETRY_AFTER), content


def _refusal(judge: Judge, status: int, content: bytes, prompt_id: str) -> BonbonError:
    name = judge.config.api_key_env
    key_hint = f"the key is read from the environment variable {name}, which is " + (
        "set" if judge.secret else "not set"
    )
    hints = {
        401: key_hint,
        403: key_hint,
        404: f"check judge.base_url, and judge.model, which is {judge.config.model!r}",
    }
    hint = hints.get(status, f"it was asked about prompt {prompt_id}")
    if status < 400:
        hint = "redirects are not followed; set judge.base_url to where it leads"
    kind = RefusedError if status in _OF_ONE_REQUEST else BonbonError
    return kind(
        f"the judge at {url_of(judge.config)} refuses with status {status} "
        f"({server_message(content, judge.secret)}); {hint}"
    )
