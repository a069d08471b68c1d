"""The interface between the server and what answers its jobs: a model or an upstream server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.strategy import Generation, Strategy
from bonbon.groups.group import Prompt
from bonbon.sampling.cost import Cost


@dataclass(frozen=True)
class AnswerJob:
    """A prompt to answer, how candidates are drawn, and how one is chosen.

    `sampling.n` candidates are drawn and the best `choices` of them returned. `logprobs` is None,
    or the number of most likely tokens to list beside each returned token (0: the token alone).
    `deadline` is a time of `time.monotonic()`. `seeded`: the client set `sampling.seed`, and
    expects the same answer to the same request.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingConfig
    strategy: Strategy
    choices: int
    deadline: float
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    seeded: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # further fields for an upstream


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a returned choice, its ln p (nats), and the most likely tokens in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One returned completion. `index` is its place among the candidates."""

    index: int
    text: str
    finish_reason: str  # "stop" or "length"
    reward: float | None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """The returned choices, best first, and their cost, rejected candidates included.

    `prompt_tokens` is the prompt's length, counted once. `failed` candidates never arrived.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    cost: Cost
    generation: Generation
    failed: int = 0


class BackendError(Exception):
    """An error that the client gets in place of an answer.

    `status` is the HTTP status, `kind` OpenAI's `type`, `code` its `code`; `retry_after` seconds
    are sent as Retry-After.
    """

    def __init__(
        self,
        message: str,
        status: int = 500,
        kind: str = "server_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after


class Backend(Protocol):
    """A local model or an upstream server that answers jobs."""

    async def start(self) -> None:
        """Prepare to answer. Raises BonbonError when that is impossible."""
        ...

    async def models(self) -> tuple[str, ...]:
        """Return the names that a request's `model` may have, the default first."""
        ...

    async def answer(self, job: AnswerJob) -> Answer:
        """Answer a job. Cancelling the task cancels the work. Raises BackendError."""
        ...

    async def healthy(self) -> bool:
        """Return whether jobs can be answered now."""
        ...

    async def close(self) -> None:
        """Stop running jobs and release all resources."""
        ...
