"""The routes of `bonbon serve`.

An OpenAI-compatible server that answers with the best of several candidates:

    POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /v1/models/{model},
    GET /health, GET /metrics
"""

from __future__ import annotations

import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from bonbon.serve.admission import Admission
from bonbon.serve.answers import bad_request
from bonbon.serve.api.errors import error_response, json_response, routing_error
from bonbon.serve.api.openapi import GENERATION, document, errors
from bonbon.serve.api.schemas import ChatCompletion, Completion, Health, ModelList, ModelObject
from bonbon.serve.backend import Backend, BackendError
from bonbon.serve.config import ServeConfig, api_key
from bonbon.serve.metrics import create_metrics
from bonbon.serve.middleware import authorised, named_locally, observed
from bonbon.serve.service import (
    CHAT,
    COMPLETIONS,
    Service,
    health_of,
    in_time,
    known_model,
    respond,
)
from bonbon.system.version import installed_version

_log = logging.getLogger(__name__)


def create_service(
    config: ServeConfig, backend: Backend, passthrough: frozenset[str] = frozenset()
) -> Service:
    """Create the state that the routes share."""
    admission = Admission(config.concurrency, config.queue)
    metrics = create_metrics(admission)
    return Service(config, backend, passthrough, admission, metrics, int(time.time()))


def create_app(service: Service) -> FastAPI:
    """Create the application; its backend must have been started.

    Raises BonbonError when the key cannot be used.
    """
    # FastAPI's documentation pages would load scripts from other hosts.
    app = FastAPI(
        title="bonbon serve",
        version=installed_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_generation(app, service)
    _add_models(app, service)
    _add_state(app, service)
    app.add_exception_handler(BackendError, _on_backend_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    key = api_key(service.config)
    if key:
        app.add_middleware(authorised, key=key)
    else:
        app.add_middleware(named_locally)
    app.add_middleware(observed, count=service.metrics.count_request)
    app.openapi = lambda: document(  # type: ignore[method-assign]
        app, service.config, service.passthrough, bool(key)
    )
    return app


# --- routes ---------------------------------------------------------------------------------------


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": ChatCompletion}, **errors(*GENERATION)},
    )
    async def chat_completions(request: Request) -> Response:
        """Create the next message of a chat: the best of `best_of` candidates.

        The best is known only when all candidates are drawn. With `stream`, comments are sent until
        then, and the pieces after that. `usage` counts the tokens of all candidates. At temperature
        0 there are no more candidates than choices.
        """
        return await respond(service, request, CHAT)

    @app.post("/v1/completions", responses={200: {"model": Completion}, **errors(*GENERATION)})
    async def completions(request: Request) -> Response:
        """Create the continuation of each prompt: the best of `best_of` candidates.

        Each prompt is a job of its own; if one fails, the request fails. Everything else is as in
        chats.
        """
        return await respond(service, request, COMPLETIONS)


def _add_models(app: FastAPI, service: Service) -> None:
    def described(name: str) -> ModelObject:
        return ModelObject(id=name, created=service.created)

    @app.get("/v1/models", responses={200: {"model": ModelList}, **errors(500, 502, 503, 504)})
    async def list_models() -> Response:
        """List the names that `model` may have, the default first."""
        async with in_time(time.monotonic() + service.config.deadline):
            models = [described(name) for name in await service.backend.models()]
        return json_response(ModelList(data=models).model_dump())

    @app.get(
        "/v1/models/{model:path}",
        responses={200: {"model": ModelObject}, **errors(404, 500, 502, 503, 504)},
    )
    async def get_model(model: str) -> Response:
        """Return one model."""
        async with in_time(time.monotonic() + service.config.deadline):
            name = await known_model(service, model)
        return json_response(described(name).model_dump())


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        """Tell whether the server can answer requests now; needs no key."""
        status = await health_of(service)
        return json_response(Health(status=status).model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        text = generate_latest(service.metrics.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


# --- errors ---------------------------------------------------------------------------------------


async def _on_backend_error(request: Request, error: Any) -> Response:
    if error.status >= 500:
        message = " ".join(error.message.split())
        _log.warning("request %s: %s", request.state.request_id, message)
    return error_response(error)


async def _on_http_exception(request: Request, error: Any) -> Response:
    return error_response(routing_error(request, error), error.headers)


async def _on_invalid_request(request: Request, error: Any) -> Response:
    return error_response(bad_request("the address has a wrong part", "invalid_value"))
