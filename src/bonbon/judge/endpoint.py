"""The endpoint of a judge: whether it may be asked, one request to it, and what it says."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from bonbon.config import JudgeConfig
from bonbon.errors import BonbonError

_LONGEST_RETRY_AFTER = 600.0  # seconds that a server may ask for
_PASSING = {408, 409, 425, 429}  # and every 5xx
_OF_ONE_REQUEST = {400, 413, 422}
_SHORTEST_SECRET = 8  # shorter ones ("EMPTY", "x") only fill the place of a key


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
    url, secret = _checked_address(config.base_url), _secret(config)
    local = _is_local(url)
    if secret and not local and url.scheme != "https":
        raise BonbonError(
            f"the key in {config.api_key_env} would go unencrypted to {config.base_url}; use an "
            "https address, a tunnel to this machine, or name another variable in judge.api_key_env"
        )
    headers = {"Content-Type": "application/json"}
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    limits = httpx.Limits(
        max_connections=config.concurrency, max_keepalive_connections=config.concurrency
    )
    # A proxy named by the environment would read what is meant to stay on this machine.
    with httpx.Client(
        headers=headers, timeout=config.timeout, limits=limits, trust_env=not local
    ) as client:
        yield Judge(config, client, secret)


def _checked_address(base_url: str) -> httpx.URL:
    # The errors do not show the address: a wrong one may have a password anywhere.
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or (url.port or 1) > 65535:
        raise BonbonError(
            "judge.base_url is no address; write it as http://HOST:PORT/v1 or https://HOST/v1"
        )
    if url.userinfo or url.query or url.fragment:
        raise BonbonError(
            "judge.base_url has a user name, a query or a fragment; leave them out, and put the "
            "key in the environment variable that judge.api_key_env names"
        )
    return url


def _is_local(url: httpx.URL) -> bool:
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return url.host == "localhost"


def _secret(config: JudgeConfig) -> str:
    """The key, or "" where none is set."""
    name = config.api_key_env
    if not re.fullmatch(r"\w+", name, re.ASCII):  # not shown: it may be the key itself
        raise BonbonError(
            "judge.api_key_env is the name of an environment variable, of letters, digits and '_'; "
            "put the key in that variable"
        )
    secret = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!-~]*", secret):
        raise BonbonError(f"the key in {name} has a blank or a non-ASCII character; set it again")
    return secret


def url_of(config: JudgeConfig) -> str:
    """Where requests go."""
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
    if status in _PASSING or status >= 500:
        raise NoReplyError(f"status {status}: {_said(judge, content)}", retry_after)
    if status >= 300:
        raise _refusal(judge, status, content, prompt_id)
    try:
        choice = json.loads(content)["choices"][0]
        is_whole = choice.get("finish_reason") != "length"
        return _reply_text(choice["message"].get("content")), is_whole
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise NoReplyError(f"status {status} without a reply: {_said(judge, content)}") from error


def _post(judge: Judge, body: bytes) -> tuple[int, float, bytes]:
    """Status, seconds to wait before the next try, and content of the response."""
    deadline = time.monotonic() + judge.config.timeout
    content = b""
    with judge.client.stream("POST", url_of(judge.config), content=body) as response:
        for chunk in response.iter_bytes():
            content += chunk
            # The client's own timeout is one between two chunks.
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the reply took too long")
    retry_after = response.headers.get("Retry-After", "")
    seconds = float(retry_after) if re.fullmatch(r"[0-9]{1,9}", retry_after) else 0.0
    return response.status_code, min(seconds, _LONGEST_RETRY_AFTER), content


def _reply_text(content: Any) -> str:
    """A message's content: a text, a list of parts of which some are texts, or nothing."""
    if content is None:  # a reasoning model that did not get beyond its thoughts
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


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
        f"({_said(judge, content)}); {hint}"
    )


def _said(judge: Judge, content: bytes) -> str:
    """A server's message, for one line of an error."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
        for name in ("error", "detail", "message"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else text
    except (ValueError, RecursionError):
        pass
    line = "".join(filter(str.isprintable, " ".join(text.split())))
    return redacted(judge, line)[:200] or "no message"


def redacted(judge: Judge, text: str) -> str:
    """The text without the key."""
    if len(judge.secret) < _SHORTEST_SECRET:
        return text
    return text.replace(judge.secret, "[key]")
