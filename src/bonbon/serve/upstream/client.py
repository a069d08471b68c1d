"""The client of an upstream server, and what its errors mean for our clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import Field

from bonbon.config.sampling import EndpointSettings
from bonbon.remote.client import Client, FaultError, RefusedError
from bonbon.remote.endpoints import checked_endpoint
from bonbon.serve.answers import out_of_time
from bonbon.serve.backend import BackendError

T = TypeVar("T")


class UpstreamConfig(EndpointSettings):
    """An OpenAI-compatible server that candidates are drawn from, such as vLLM."""

    model: str | None = Field(None, description="the only model to offer; None: all it has")
    timeout: float = Field(60.0, gt=0, description="seconds that one try of a candidate may take")
    concurrency: int = Field(64, ge=1, description="candidates drawn at a time")
    retries: int = Field(4, ge=0, description="of each candidate, with growing pauses")
    scoring_share: float = Field(
        0.1, ge=0, lt=1, description="share of a request's time that is kept for the reward"
    )
    processed_logprobs: bool = Field(
        False,
        description="its log-probabilities are those under the sampling settings "
        "(vLLM: --logprobs-mode processed_logprobs) and not at temperature 1",
    )


class UpstreamClient(Client):
    """A `Client` that raises the upstream's refusals as errors for our own clients.

    Raises BonbonError when the address or the key cannot be used.
    """

    def __init__(self, config: UpstreamConfig) -> None:
        super().__init__(
            checked_endpoint(config.base_url, config.api_key_env, "upstream"),
            timeout=config.timeout,
            retries=config.retries,
            concurrency=config.concurrency,
        )

    async def get(self, path: str, read: Callable[[Any], T]) -> T:
        """See `Client.get`. Raises BackendError where the upstream refuses."""
        try:
            return await super().get(path, read)
        except RefusedError as refusal:
            raise refused(refusal) from refusal

    async def post(
        self, path: str, body: dict[str, Any], read: Callable[[Any], T], cutoff: float
    ) -> T:
        """See `Client.post`. Raises BackendError where the upstream refuses."""
        try:
            return await super().post(path, body, read, cutoff)
        except RefusedError as refusal:
            raise refused(refusal) from refusal


def refused(refusal: RefusedError) -> BackendError:
    """Return the client's error for a refusal: the request's own fault, or the upstream's."""
    status = refusal.status
    if refusal.about_key:
        message = f"the upstream refuses this server with status {status}; {refusal.message}"
        return upstream_error(message)
    if refusal.about_request or status == 404:
        shown = 404 if status == 404 else 400
        kind = "invalid_request_error"
        return BackendError(refusal.message, shown, kind, refusal.code, refusal.param)
    return upstream_error(f"the upstream refuses with status {status}: {refusal.message}")


def upstream_error(message: str, retry_after: float | None = None) -> BackendError:
    """Return the error of a job that failed because of the upstream."""
    return BackendError(message, 502, "upstream_error", "upstream_error", retry_after=retry_after)


def error_of(faults: Sequence[FaultError]) -> BackendError:
    """Return the error of a job that lost all candidates: 504 if all were only too slow."""
    lost = f"the upstream gave none of the {len(faults)} candidates"
    others = [fault for fault in faults if not fault.slow]
    if not others:
        return out_of_time(f"{lost}: {faults[-1]}")
    asked_for = max(fault.retry_after for fault in others)
    return upstream_error(f"{lost}: {others[-1]}", asked_for or None)
