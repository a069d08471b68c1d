"""The handling of a request, from its body to its response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from bonbon.serve.admission import Admission, Ticket
from bonbon.serve.answers import out_of_time
from bonbon.serve.api.errors import json_response
from bonbon.serve.api.replies import chat_completion, completion
from bonbon.serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse_request,
)
from bonbon.serve.api.streaming import EventStream
from bonbon.serve.backend import Answer, AnswerJob, Backend, BackendError
from bonbon.serve.config import ServeConfig
from bonbon.serve.connection import read_json_body, while_wanted
from bonbon.serve.jobs import jobs_of, prompts_of
from bonbon.serve.metrics import Metrics

_HEALTH_SECONDS = 5.0


@dataclass(frozen=True)
class Service:
    """The state that the routes share. `passthrough` fields go to the backend unchanged."""

    config: ServeConfig
    backend: Backend
    passthrough: frozenset[str]
    admission: Admission
    metrics: Metrics
    created: int
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Refuse waiting and new requests with 503."""
        self.admission.stop()

    def abort(self) -> None:
        """End running requests with 503."""
        self.stop()
        self.aborted.set()


@dataclass(frozen=True)
class Dialect:
    """The request class, id prefix and reply format of a route."""

    kind: type[GenerationRequest]
    prefix: str
    write: Callable[[str, AnswerJob, Sequence[Answer], bool], dict[str, Any]]


CHAT = Dialect(ChatRequest, "chatcmpl-", chat_completion)
COMPLETIONS = Dialect(CompletionRequest, "cmpl-", completion)


async def respond(service: Service, request: Request, dialect: Dialect) -> Response:
    """Return the response to a request for choices. Raises BackendError."""
    deadline = time.monotonic() + service.config.deadline
    values = await read_json_body(request, service.config.max_body_bytes, service.config.deadline)
    parsed, extra = parse_request(dialect.kind, values, service.passthrough)
    service.admission.check_size(len(prompts_of(parsed)))  # before jobs are created
    request_id = dialect.prefix + request.state.request_id
    async with in_time(deadline):
        model = await known_model(service, parsed.model)
    jobs = jobs_of(
        parsed, service.config, request_id=request_id, model=model, deadline=deadline, extra=extra
    )

    async def whole(receive: Receive) -> dict[str, Any]:
        work = answer_all(service, jobs)
        answers = await while_wanted(work, receive, service.aborted)
        return dialect.write(request_id, jobs[0], answers, parsed.return_candidates)

    if parsed.stream:
        return EventStream(whole, parsed.include_usage, service.config.keepalive)
    return json_response(await whole(request.receive))


async def known_model(service: Service, name: str | None) -> str:
    """Return the model that a request names, or the default. Raises BackendError if unknown."""
    models = await service.backend.models()
    if not models:
        raise BackendError("there is no model yet; try again later", 503)
    if name is None:
        return models[0]
    if name not in models:
        raise BackendError(
            f"there is no model {name!r:.100}; there are {', '.join(models[:20])}",
            404,
            "invalid_request_error",
            "model_not_found",
            "model",
        )
    return name


async def answer_all(service: Service, jobs: Sequence[AnswerJob]) -> list[Answer]:
    """Return the answers to all jobs of a request. Raises BackendError if one fails or is late."""
    with service.admission.tickets(len(jobs)) as tickets:
        try:
            async with in_time(jobs[0].deadline), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(_answer(service, job, ticket))
                    for job, ticket in zip(jobs, tickets, strict=True)
                ]
        except ExceptionGroup as errors:  # the others were cancelled
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]


async def _answer(service: Service, job: AnswerJob, ticket: Ticket) -> Answer:
    await service.admission.turn(ticket)
    try:
        answer = await service.backend.answer(job)
    finally:
        service.admission.leave(ticket)
    service.metrics.count_answer(answer)
    return answer


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """Raise BackendError (504) if the body runs past `deadline` (`time.monotonic()`)."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError as error:
        raise out_of_time() from error


async def health_of(service: Service) -> Literal["ok", "unavailable", "stopping"]:
    """Return `ok`, `unavailable` or `stopping`."""
    if service.admission.stopping:
        return "stopping"
    try:
        async with asyncio.timeout(_HEALTH_SECONDS):
            healthy = await service.backend.healthy()
    except (TimeoutError, BackendError):
        healthy = False
    return "ok" if healthy else "unavailable"
