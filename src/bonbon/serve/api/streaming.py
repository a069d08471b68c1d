"""Replies as server-sent events.

The best candidate is known only when all are drawn, so nothing can be streamed before. If that
takes less than `keepalive` seconds, an error still has its HTTP status. After that the stream
begins with comments, which clients ignore, and an error is an event.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import zip_longest
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bonbon.serve.api.errors import error_object, internal_error, json_bytes
from bonbon.serve.backend import BackendError

_log = logging.getLogger(__name__)

# Words with the spaces before them; long ones (many scripts have no spaces) in several pieces.
_PIECE = re.compile(r"\s*\S{1,40}|\s+")


class EventStream(Response):
    """A response that streams a reply once `work` returns it, and sends comments until then.

    Args:
        work: makes the reply, given the request's `receive`.
        include_usage: whether to add a last chunk with the usage.
        keepalive: seconds between comments, and before the first one.
    """

    def __init__(
        self,
        work: Callable[[Receive], Awaitable[dict[str, Any]]],
        include_usage: bool,
        keepalive: float,
    ) -> None:
        super().__init__()
        self._work = work
        self._include_usage = include_usage
        self._keepalive = keepalive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises what `work` raises in the first `keepalive` seconds."""
        task = asyncio.ensure_future(self._work(receive))
        try:
            await asyncio.wait({task}, timeout=self._keepalive)
            if task.done():
                task.result()
            stream = EventSourceResponse(
                self._events(task),
                headers={"Cache-Control": "no-cache"},
                ping=self._keepalive,
                ping_message_factory=_waiting,
                sep="\n",
                # By itself it cuts streams half a second after a signal; the service's own grace
                # decides when a job ends.
                shutdown_event=anyio.Event(),
                shutdown_grace_period=math.inf,
            )
            await stream(scope, receive, send)
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _events(self, task: asyncio.Future[dict[str, Any]]) -> AsyncIterator[ServerSentEvent]:
        if not task.done():
            yield _waiting()
            await asyncio.wait({task})
        for data in _data(task, self._include_usage):
            yield ServerSentEvent(data.decode(), sep="\n")


def _waiting() -> ServerSentEvent:
    return ServerSentEvent(comment="waiting", sep="\n")


def _data(task: asyncio.Future[dict[str, Any]], include_usage: bool) -> Iterator[bytes]:
    try:
        whole = task.result()
    except BackendError as error:
        yield json_bytes(error_object(error))
        return
    except Exception:
        _log.exception("a stream failed")
        yield json_bytes(error_object(internal_error()))
        return
    yield from map(json_bytes, chunks(whole, include_usage))
    yield b"[DONE]"


def chunks(whole: dict[str, Any], include_usage: bool) -> Iterator[dict[str, Any]]:
    """Split a reply into the chunks of a stream.

    The pieces of the choices alternate. All log-probabilities of a choice come with its first
    piece, since pieces are not tokens; `bonbon` comes with the last chunk.
    """
    chat = whole["object"] == "chat.completion"
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    head = {
        "id": whole["id"],
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": whole["created"],
        "model": whole["model"],
    }
    parts = [_chat_parts(c) if chat else _text_parts(c) for c in whole["choices"]]
    turns = [part for turn in zip_longest(*parts) for part in turn if part is not None]
    last = {} if include_usage else {"bonbon": whole["bonbon"]}
    for number, part in enumerate(turns, start=1):
        yield {**head, "choices": [part], **usage, **(last if number == len(turns) else {})}
    if include_usage:
        yield {**head, "choices": [], "usage": whole["usage"], "bonbon": whole["bonbon"]}


def _chat_parts(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def part(
        delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return {
            "index": choice["index"],
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    yield part({"role": "assistant", "content": "", "refusal": None})
    logprobs = choice["logprobs"]
    for piece in pieces(choice["message"]["content"]):
        yield part({"content": piece}, logprobs=logprobs)
        logprobs = None
    yield part({}, choice["finish_reason"])


def _text_parts(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    logprobs = choice["logprobs"]
    for piece in pieces(choice["text"]):
        yield {**choice, "text": piece, "logprobs": logprobs, "finish_reason": None}
        logprobs = None
    yield {**choice, "text": "", "logprobs": None}


def pieces(text: str) -> list[str]:
    """Split a text into one or more pieces; joined, they are the text again."""
    return _PIECE.findall(text) or [""]
