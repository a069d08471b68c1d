"""Asking a server over HTTP: requests, retries, and what its errors mean."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from itertools import count
from typing import Any, TypeVar

import httpx

from bonbon.remote.endpoints import (
    Endpoint,
    backoff,
    is_passing,
    retry_after_seconds,
    server_message,
)

T = TypeVar("T")

# Seconds between tries.
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 30.0
_GET_SECONDS = 10.0
_GET_RETRIES = 2
_LONGEST_MESSAGE = 500  # of a server's own, characters


class FaultError(Exception):
    """Something that a try did not bring.

    `retry_after`: seconds that the server asks for. `slow`: time ran out. `lasting`: another try
    would bring the same.
    """

    def __init__(
        self, why: str, retry_after: float = 0.0, slow: bool = False, lasting: bool = False
    ) -> None:
        super().__init__(why)
        self.retry_after = retry_after
        self.slow = slow
        self.lasting = lasting


class RefusedError(Exception):
    """A request that the server will not do, now or later.

    `status` is its HTTP status, `message` its own word or, about the key, ours; `code` and `param`
    are those of an OpenAI error object.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(f"status {status}: {message}")
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def about_key(self) -> bool:
        """Return whether it is the key that is refused."""
        return self.status in (401, 403)

    @property
    def about_request(self) -> bool:
        """Return whether it is what this very request holds that is refused."""
        return self.status in (400, 413, 422)


class Client:
    """Sends requests to a server; at most `concurrency` posts at a time.

    `timeout` is in seconds a try; `retries` are those of a post. Must be made in the event loop
    that uses it.
    """

    def __init__(
        self, endpoint: Endpoint, *, timeout: float, retries: int, concurrency: int
    ) -> None:
        self.endpoint = endpoint
        self._timeout, self._retries = timeout, retries
        self._turns = asyncio.Semaphore(concurrency)
        # The turns are what limits; a pool with a limit of its own would queue health checks.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        # A proxy named by the environment would read what is meant to stay on this machine.
        self._http = httpx.AsyncClient(
            headers=endpoint.headers(),
            timeout=timeout,
            limits=limits,
            trust_env=not endpoint.local,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # clients share none
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def get(self, path: str, read: Callable[[Any], T]) -> T:
        """Ask a small question, which waits for no turn; return what `read` makes of the reply.

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
        """Send a request, with retries until `cutoff` (monotonic); return what `read` makes of it.

        `read` raises FaultError for a reply that is no use, and LookupError, TypeError, ValueError
        or AttributeError for what is no reply at all.

        Raises FaultError where no try brought one, RefusedError where the server refuses.
        """
        text = json.dumps(body, ensure_ascii=False)
        content = text.encode(errors="replace")  # servers refuse lone surrogates, escaped or not

        async def send() -> httpx.Response:
            async with self._turns:  # not kept while pausing
                return await self._send("POST", path, content)

        try:
            async with asyncio.timeout(cutoff - time.monotonic()):
                return await self._until_read(send, read, self._retries, cutoff)
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
            async with asyncio.timeout(self._timeout):
                return await self._http.request(method, self.endpoint.url(path), content=content)
        except (TimeoutError, httpx.TimeoutException) as error:
            why = f"it took longer than {self._timeout:g} seconds"
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
        return server_message(response.content, self.endpoint.secret, _LONGEST_MESSAGE)

    def _refusal(self, status: int, response: httpx.Response) -> RefusedError:
        if status in (401, 403):
            # Not its message: it may show a part of the key.
            state = "set but not accepted" if self.endpoint.secret else "not set"
            name = self.endpoint.api_key_env
            message = f"the key is read from the environment variable {name}, which is {state}"
            return RefusedError(status, message)
        return RefusedError(status, self._said(response), *_code_and_param(response.content))


def _code_and_param(content: bytes) -> tuple[str | None, str | None]:
    """The `code` and `param` of an error object, where they are texts."""
    try:
        error = json.loads(content)["error"]
        found = (error.get("code"), error.get("param"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, None
    code, param = (value if isinstance(value, str) else None for value in found)
    return code, param
