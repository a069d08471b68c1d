"""OpenAI's error objects, and JSON as the server writes it.

Every error is a `BackendError` before it is written, whether it comes from the backend, the request
or the framework. `kind` is OpenAI's `type`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bonbon.serve.answers import bad_request
from bonbon.serve.backend import BackendError

CLIENT_GONE = 499  # sent to nobody; for the log and the metrics


def json_bytes(value: Any) -> bytes:
    """Return JSON in UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="replace")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON response."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def error_object(error: BackendError) -> dict[str, Any]:
    """Return an error as the JSON object that clients get."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: BackendError, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as a response with its status, and Retry-After if it is known."""
    after = {}
    if error.retry_after is not None:
        after["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return json_response(error_object(error), error.status, {**(headers or {}), **after})


def internal_error() -> BackendError:
    """Return the error of an unexpected exception, without its details."""
    return BackendError("the server failed unexpectedly; see its log", 500, "server_error")


def stopping() -> BackendError:
    """Return the error of a request that cannot finish because the server stops."""
    return BackendError("the server is stopping", 503, "server_error", "stopping")


def client_gone() -> BackendError:
    """Return the error of a request whose client has disconnected."""
    return BackendError("the client went away", CLIENT_GONE, "client_gone", "client_gone")


def unauthorised() -> BackendError:
    """Return the error of a wrong or missing key."""
    return BackendError(
        "the API key is missing or wrong; send it as Authorization: Bearer KEY",
        401,
        "invalid_request_error",
        "invalid_api_key",
    )


def wrong_host() -> BackendError:
    """Return the error of a request whose Host header names another machine."""
    return BackendError(
        "without a key this server answers only to localhost, 127.0.0.1 and [::1]; use one of "
        "these addresses, or start it with a key",
        403,
        "invalid_request_error",
        "wrong_host",
    )


def routing_error(request: Request, error: HTTPException) -> BackendError:
    """Return the framework's error of an unknown address or method as a BackendError."""
    where = f"{request.method} {request.scope.get('raw_path', b'').decode('ascii', 'replace')}"
    if error.status_code == 404:
        return BackendError(
            f"unknown address: {where}", 404, "invalid_request_error", "unknown_url"
        )
    code = "method_not_allowed" if error.status_code == 405 else None
    message = f"{error.detail}: {where}"
    return BackendError(message, error.status_code, "invalid_request_error", code)


def invalid_fields(error: ValidationError, values: Any) -> BackendError:
    """Return the error of a request with wrong fields, naming the most deeply nested one.

    pydantic reports each member of a union; the member that fits best fails deepest. The value that
    was sent is not repeated.
    """
    problems = [(_path(problem, values), problem) for problem in error.errors()]
    deepest = max(problems, key=lambda item: len(item[0]))[0]
    messages = [_message(problem) for path, problem in problems if path == deepest]
    where = _dotted(deepest)
    unknown = any(p["type"] == "extra_forbidden" for path, p in problems if path == deepest)
    if unknown:
        return bad_request(f"unknown field {where!r}", "unknown_parameter", where)
    text = " or ".join(dict.fromkeys(messages))
    return bad_request(f"{where}: {text}" if where else text, "invalid_value", where or None)


def _message(problem: Mapping[str, Any]) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")


def _path(problem: Mapping[str, Any], values: Any) -> tuple[int | str, ...]:
    """Return the path of an error in the request, without the names of a union's members."""
    path: list[int | str] = []
    for part in problem["loc"]:
        inside = part in values if isinstance(values, dict) else isinstance(values, list)
        if inside and isinstance(part, str if isinstance(values, dict) else int):
            values = values[part]
            path.append(part)
        elif problem["type"] == "missing" and part == problem["loc"][-1]:
            path.append(part)
    return tuple(path)


def _dotted(path: Sequence[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
