"""A request's body, and whether its client still waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from bonbon.serve.answers import bad_request
from bonbon.serve.api.errors import client_gone, stopping
from bonbon.serve.backend import BackendError

T = TypeVar("T")


async def read_json_body(request: Request, most: int, seconds: float) -> Any:
    """Read a JSON body of at most `most` bytes within `seconds`, as plain values.

    Raises BackendError for a body that is longer (the rest is not kept), slower, of another media
    type, or not JSON. NaN, infinities, half surrogate pairs and nesting of 200 levels are not JSON.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Also refuses web pages: browsers let them send other types to any address without a preflight.
    if media_type != "application/json":
        raise BackendError(
            "the body must be JSON, with the header Content-Type: application/json",
            415,
            "invalid_request_error",
            "unsupported_media_type",
        )
    body = await _read(request, most, seconds)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}", "invalid_json") from error


async def _read(request: Request, most: int, seconds: float) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError as error:
        message = f"the body did not come within {seconds:g} seconds"
        raise BackendError(message, 408, "timeout_error", "timeout") from error
    except ClientDisconnect as error:
        raise client_gone() from error
    return bytes(body)


def _too_large(most: int) -> BackendError:
    return BackendError(
        f"the body has more than {most} bytes", 413, "invalid_request_error", "body_too_large"
    )


async def while_wanted(work: Coroutine[Any, Any, T], receive: Receive, aborted: asyncio.Event) -> T:
    """Return the result of `work`; cancel it when the client disconnects or the server aborts.

    Raises BackendError in these two cases. The body must have been read before. Returns or raises
    only when `work` has ended.
    """
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(work),
        asyncio.create_task(_gone(receive)),
        asyncio.create_task(_aborted(aborted)),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: T = next(task for task in tasks if task in done).result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise client_gone()


async def _aborted(aborted: asyncio.Event) -> NoReturn:
    await aborted.wait()
    raise stopping()
