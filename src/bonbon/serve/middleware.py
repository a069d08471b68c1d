"""Middleware of every route: access log, metrics, unexpected exceptions, and access checks."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bonbon.remote.endpoints import is_loopback
from bonbon.serve.api.errors import (
    CLIENT_GONE,
    error_response,
    internal_error,
    unauthorised,
    wrong_host,
)

_log = logging.getLogger(__name__)

_OPEN = ("/health",)
_OTHER = "other"  # label of unknown routes, so that clients cannot create labels


def observed(app: ASGIApp, count: Callable[[str, int, float], Any]) -> ASGIApp:
    """Give each request an id, count and log it, and answer uncaught exceptions with an error.

    The log omits the query, which may hold a key, and the body.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began, status = time.perf_counter(), CLIENT_GONE
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await app(scope, receive, note)
        except Exception:
            _log.exception("request %s failed", request_id)
            if status == CLIENT_GONE:  # nothing was sent yet
                await error_response(internal_error())(scope, receive, note)
        finally:
            seconds = time.perf_counter() - began
            count(_route(scope), status, seconds)
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
            _log.info("%s %s %d %.3fs %s", scope["method"], path, status, seconds, request_id)

    return wrapped


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", _OTHER)


def named_locally(app: ASGIApp) -> ASGIApp:
    """Accept only requests whose Host header names this machine.

    This prevents DNS rebinding: a web page can make a host name of its own resolve to this machine,
    and without a key only the Host header reveals it.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_loopback(_host(scope)):
            await app(scope, receive, send)
        else:
            await error_response(wrong_host())(scope, receive, send)

    return wrapped


def _host(scope: Scope) -> str:
    """Return the Host header without its port and brackets."""
    name = Headers(scope=scope).get("host", "")
    host, _, port = name.rpartition(":")
    return (host if host and port.isdecimal() else name).strip("[]").lower()


def authorised(app: ASGIApp, key: str) -> ASGIApp:
    """Refuse requests without the key, except for `/health`."""
    expected = key.encode()

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.encode("latin-1"), expected)
        if scope["path"] in _OPEN or (right and scheme.lower() == "bearer"):
            await app(scope, receive, send)
        else:
            await error_response(unauthorised())(scope, receive, send)

    async def http_only(scope: Scope, receive: Receive, send: Send) -> None:
        await (wrapped if scope["type"] == "http" else app)(scope, receive, send)

    return http_only
