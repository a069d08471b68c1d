"""Asking a server over HTTP: requests, retries, and what its errors mean."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_exponential,
)

from bonbon.remote.endpoints import Endpoint, is_passing, retry_after_seconds, server_message

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
    are those of an OpenAI error object. `server_text` is its own word in any case, without the key.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        server_text: str | None = None,
    ) -> None:
        super().__init__(f"status {status}: {message}")
        self.status = status
        self.message = message
        self.server_text = message if server_text is None else server_text
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


@dataclass(frozen=True)
class Pauses:
    """The seconds between tries: twice as many after each try, from `first` up to `longest`.

    They are spread by a quarter to either side, so that requests that failed together do not come
    back together. A server that asks for a longer pause gets it, up to `longest_asked`.
    """

    first: float
    longest: float
    longest_asked: float = math.inf

    def __call__(self, state: RetryCallState) -> float:
        """Return the seconds before the next try, as tenacity asks for them."""
        growing = wait_exponential(self.first, self.longest)(state) * random.uniform(0.75, 1.25)
        fault = None if state.outcome is None else state.outcome.exception()
        asked_for = fault.retry_after if isinstance(fault, FaultError) else 0.0
        return max(growing, min(asked_for, self.longest_asked))


class Client:
    """Sends requests to a server; at most `concurrency` posts at a time.

    `timeout` is in seconds a try; `retries` are those of a post. Must be made in the event loop
    that uses it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float,
        retries: int,
        concurrency: int,
        pauses: Pauses | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._timeout, self._retries = timeout, retries
        self._pauses = pauses or Pauses(_FIRST_PAUSE, _LONGEST_PAUSE)
        self._stopped = asyncio.Event()
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

    def stop(self) -> None:
        """Try nothing again from now on. A request that pauses ends with a FaultError."""
        self._stopped.set()

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

        `cutoff` may be infinite; the retries are the limit then.

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
            async with asyncio.timeout(None if cutoff == math.inf else cutoff - time.monotonic()):
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
        async def attempt() -> T:
            return self._read(await send(), read)

        def is_over(state: RetryCallState) -> bool:
            too_late = time.monotonic() + state.upcoming_sleep >= cutoff
            return too_late or state.attempt_number > retries

        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda error: isinstance(error, FaultError) and not error.lasting
            ),
            wait=self._pauses,
            stop=is_over,
            sleep=self._pause,
            reraise=True,
        )
        return await retrying(attempt)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            return
        raise FaultError("stopped")

    async def _send(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        """One try. Raises FaultError when no whole response came in time."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._http.request(method, self.endpoint.url(path), content=content)
        except (TimeoutError, httpx.TimeoutException) as error:
            why = f"it took longer than {self._timeout:g} seconds"
            raise FaultError(why, slow=True) from error
        except httpx.RequestError as error:
            why = f"{type(error).__name__}: {_reason(error)}".removesuffix(": ")
            raise FaultError(why) from error

    def _read(self, response: httpx.Response, read: Callable[[Any], T]) -> T:
        status = response.status_code
        if is_passing(status):
            asked_for = retry_after_seconds(response.headers.get("Retry-After", ""))
            raise FaultError(f"status {status}: {self._server_text(response)}", asked_for)
        if status >= 300:
            raise self._refusal(status, response)
        try:
            return read(json.loads(response.content))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FaultError(
                f"status {status} without a reply: {self._server_text(response)}"
            ) from error

    def _server_text(self, response: httpx.Response) -> str:
        return server_message(response.content, self.endpoint.secret, _LONGEST_MESSAGE)

    def _refusal(self, status: int, response: httpx.Response) -> RefusedError:
        if status in (401, 403):
            # Not its message: it may show a part of the key.
            state = "set but not accepted" if self.endpoint.secret else "not set"
            name = self.endpoint.api_key_env
            message = f"the key is read from the environment variable {name}, which is {state}"
            return RefusedError(status, message, server_text=self._server_text(response))
        return RefusedError(status, self._server_text(response), *_code_and_param(response.content))


def _reason(error: httpx.RequestError) -> str:
    """The system's own word for a lost connection, which libraries hide, or else the error's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError) and cause.errno is not None:
            return os.strerror(cause.errno)
        if isinstance(cause, BaseExceptionGroup):  # one a try of each address of a name
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return str(error)


def _code_and_param(content: bytes) -> tuple[str | None, str | None]:
    """The `code` and `param` of an error object, where they are texts."""
    try:
        error = json.loads(content)["error"]
        texts = (error.get("code"), error.get("param"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, None
    code, param = (value if isinstance(value, str) else None for value in texts)
    return code, param
