"""Asking an upstream server: requests, retries, and what an error of it means for a client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from itertools import count
from typing import Any, TypeVar

import httpx
from pydantic import Field

from bonbon.config import Settings
from bonbon.endpoints import (
    backoff,
    checked_endpoint,
    is_passing,
    retry_after_seconds,
    said,
)
from bonbon.serve.answers import out_of_time
from bonbon.serve.backend import BackendError
from bonbon.serve.upstream_protocol import FaultError

T = TypeVar("T")

# Seconds between tries.
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 30.0
_GET_SECONDS = 10.0
_GET_RETRIES = 2
_OF_THE_REQUEST = {400, 413, 422}
_LONGEST_MESSAGE = 500  # of an upstream's own, characters


class UpstreamConfig(Settings):
    """An OpenAI-compatible server that candidates are drawn from, such as vLLM."""

    base_url: str = Field("http://127.0.0.1:8000/v1", description="up to /completions")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="the environment variable that holds the key, if one is set"
    )
    model: str | None = Field(None, description="the only one offered; None: all that it has")
    timeout: float = Field(60.0, gt=0, description="seconds that one try of a candidate may take")
    concurrency: int = Field(64, ge=1, description="candidates drawn at a time")
    retries: int = Field(4, ge=0, description="of a candidate, with growing pauses")
    scoring_share: float = Field(
        0.1, ge=0, lt=1, description="of a request's time, kept for the reward"
    )
    processed_logprobs: bool = Field(
        False,
        description="its log-probabilities are those under the sampling settings "
        "(vLLM: --logprobs-mode processed_logprobs) and not at temperature 1",
    )


class UpstreamClient:
    """Sends requests to an upstream; at most `config.concurrency` candidates at a time.

    Must be made in the event loop that uses it. Raises BonbonError when the address or the key
    cannot be used.
    """

    def __init__(self, config: UpstreamConfig) -> None:
        self.config = config
        self.endpoint = checked_endpoint(config.base_url, config.api_key_env, "upstream")
        self._turns = asyncio.Semaphore(config.concurrency)
        # The turns are what limits; a pool with a limit of its own would queue health checks.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency)
        # A proxy named by the environment would read what is meant to stay on this machine.
        self._http = httpx.AsyncClient(
            headers=self.endpoint.headers(),
            timeout=config.timeout,
            limits=limits,
            trust_env=not self.endpoint.local,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # clients share none
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def get(self, path: str, read: Callable[[Any], T]) -> T:
        """What `read` makes of the reply to a small question, which waits for no turn; see `post`.

        Soon given up, as others wait for it.
        """

        async def send() -> httpx.Response:
            return await self._send("GET", path, None)

        cutoff = time.monotonic() + _GET_SECONDS
        try:
            async with asyncio.timeout(_GET_SECONDS):
                return await self._until_read(send, read, _GET_RETRIES, cutoff)
        except TimeoutError as error:
            raise FaultError(f"it took longer than {_GET_SECONDS:g} seconds", slow=True) from error

    async def post(
        self, path: str, body: dict[str, Any], read: Callable[[Any], T], cutoff: float
    ) -> T:
        """What `read` makes of the reply to one request, tried again until `cutoff` (monotonic).

        Raises FaultError where no try brought one, BackendError where the upstream refuses.
        """
        text = json.dumps(body, ensure_ascii=False)
        content = text.encode(errors="replace")  # servers refuse lone surrogates, escaped or not

        async def send() -> httpx.Response:
            async with self._turns:  # not kept while pausing
                return await self._send("POST", path, content)

        try:
            async with asyncio.timeout(cutoff - time.monotonic()):
                return await self._until_read(send, read, self.config.retries, cutoff)
        except TimeoutError as error:
            raise FaultError("the request's time was over", slow=True) from error

    async def _until_read(
        self,
        send: Callable[[], Awaitable[httpx.Response]],
        read: Callable[[Any], T],
        retries: int,
        cutoff: float,
    ) -> T:
        for attempt in count():
            try:
                return self._read(await send(), read)
            except FaultError as fault:
                pause = max(backoff(attempt, _FIRST_PAUSE, _LONGEST_PAUSE), fault.retry_after)
                if fault.lasting or attempt >= retries or time.monotonic() + pause >= cutoff:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("count() does not end")

    async def _send(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        """One try. Raises FaultError when no whole response came in time."""
        try:
            async with asyncio.timeout(self.config.timeout):
                return await self._http.request(method, self.endpoint.url(path), content=content)
        except (TimeoutError, httpx.TimeoutException) as error:
            why = f"it took longer than {self.config.timeout:g} seconds"
            raise FaultError(why, slow=True) from error
        except httpx.RequestError as error:
            raise FaultError(f"{type(error).__name__}: {error}".removesuffix(": ")) from error

    def _read(self, response: httpx.Response, read: Callable[[Any], T]) -> T:
        status = response.status_code
        if is_passing(status):
            asked_for = retry_after_seconds(response.headers.get("Retry-After", ""))
            raise FaultError(f"status {status}: {self._said(response)}", asked_for)
        if status >= 300:
            raise self._refusal(status, response)
        try:
            return read(json.loads(response.content))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FaultError(f"status {status} without a reply: {self._said(response)}") from error

    def _said(self, response: httpx.Response) -> str:
        return said(response.content, self.endpoint.secret, _LONGEST_MESSAGE)

    def _refusal(self, status: int, response: httpx.Response) -> BackendError:
        if status in (401, 403):
            # Not its message: it may show a part of the key.
            state = "set but not accepted" if self.endpoint.secret else "not set"
            return upstream_error(
                f"the upstream refuses this server with status {status}; the key is read from the "
                f"environment variable {self.config.api_key_env}, which is {state}"
            )
        if status in _OF_THE_REQUEST or status == 404:
            code, param = _code_and_param(response.content)
            shown = 404 if status == 404 else 400
            return BackendError(self._said(response), shown, "invalid_request_error", code, param)
        return upstream_error(f"the upstream refuses with status {status}: {self._said(response)}")


def _code_and_param(content: bytes) -> tuple[str | None, str | None]:
    """The `code` and `param` of an error object, where they are texts."""
    try:
        error = json.loads(content)["error"]
        found = (error.get("code"), error.get("param"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, None
    code, param = (value if isinstance(value, str) else None for value in found)
    return code, param


def upstream_error(message: str, retry_after: float | None = None) -> BackendError:
    """The error of a job that the upstream's fault keeps from being done."""
    return BackendError(message, 502, "upstream_error", "upstream_error", retry_after=retry_after)


def error_of(faults: Sequence[FaultError]) -> BackendError:
    """The error of a job all of whose candidates were lost: 504 where only time was short."""
    lost = f"the upstream gave none of the {len(faults)} candidates"
    others = [fault for fault in faults if not fault.slow]
    if not others:
        return out_of_time(f"{lost}: {faults[-1]}")
    asked_for = max(fault.retry_after for fault in others)
    return upstream_error(f"{lost}: {others[-1]}", asked_for or None)
