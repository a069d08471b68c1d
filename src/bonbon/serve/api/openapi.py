"""The OpenAPI document: FastAPI's own, and the request bodies that FastAPI does not read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from bonbon.decoding.catalogue import STRATEGIES
from bonbon.serve.api.requests import (
    IGNORED,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from bonbon.serve.api.schemas import ErrorReply
from bonbon.serve.config import ServeConfig

# Error statuses of a request for choices.
GENERATION = (400, 404, 408, 413, 415, 429, 500, 502, 503, 504)

_REFERENCE = "#/components/schemas/{model}"
_BODIES: dict[str, type[GenerationRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_STRATEGY = {
    "anyOf": [
        {"type": "string", "enum": list(STRATEGIES)},
        {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": list(STRATEGIES)}},
            "required": ["name"],
        },
        {"type": "null"},
    ]
}
# An event of a stream, in the form that FastAPI uses.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return a route's error responses by status."""
    return {status: {"model": ErrorReply} for status in statuses}


def document(
    app: FastAPI, config: ServeConfig, passthrough: Iterable[str], with_key: bool
) -> dict[str, Any]:
    """Build the document of an application, with the limits of its configuration.

    `passthrough` names the fields that go to the backend as they are.
    """
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = schema["components"]["schemas"]
    for path, kind in _BODIES.items():
        schemas |= _body_schemas(kind, config, passthrough)
        body = {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}
        operation = schema["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
        operation["responses"]["200"]["content"]["text/event-stream"] = {"itemSchema": _EVENT}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours is 400
            if with_key and path != "/health":
                _add_key(operation)
    if with_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema


def _body_schemas(
    kind: type[GenerationRequest], config: ServeConfig, passthrough: Iterable[str]
) -> dict[str, Any]:
    """A request's schema and those that it refers to, with the fields that its class leaves out."""
    schema = kind.model_json_schema(ref_template=_REFERENCE)
    others: dict[str, Any] = schema.pop("$defs", {})
    properties = schema["properties"]
    properties["strategy"] = properties["strategy"] | _STRATEGY
    limits = {
        "n": config.max_best_of,
        "best_of": config.max_best_of,
        "max_tokens": config.max_tokens,
        "max_completion_tokens": config.max_tokens,
    }
    for name in limits.keys() & properties.keys():
        properties[name]["anyOf"][0]["maximum"] = limits[name]
    neutral = {name: {"enum": [None, *values]} for name, values in NEUTRAL.items()}
    ignored = {name: {"description": "ignored"} for name in sorted(IGNORED)}
    passed = {name: {"description": "passed on"} for name in sorted(passthrough)}
    schema["properties"] = neutral | ignored | passed | properties
    return others | {kind.__name__: schema}


def _add_key(operation: dict[str, Any]) -> None:
    reply = {"schema": {"$ref": _REFERENCE.format(model=ErrorReply.__name__)}}
    operation["security"] = [{"key": []}]
    operation["responses"]["401"] = {
        "description": "The key is missing or wrong",
        "content": {"application/json": reply},
    }
