"""Draws a job's candidates from an upstream, for the thread that runs its strategy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

from bonbon.decoding.strategy import Floats
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.remote.client import FaultError
from bonbon.remote.completions_api import Offer
from bonbon.sampling.cost import Candidates, Cost
from bonbon.serve.backend import AnswerJob, BackendError, TokenLogprob
from bonbon.serve.upstream.client import UpstreamClient, error_of
from bonbon.serve.upstream.protocol import (
    Reply,
    candidates_of,
    path_of,
    read_reply,
    request_body,
    spent_on,
)
from bonbon.system.errors import BonbonError

NO_EMBEDDING = (
    "an upstream server cannot embed completions; set the strategy's `distance` or `embedding` to "
    "a function or a model of texts, or use a local model"
)


class UpstreamSource:
    """A `Source` for one job: the strategy's thread draws from the upstream via the event loop."""

    def __init__(
        self, client: UpstreamClient, job: AnswerJob, model: str, offer: Offer, cutoff: float
    ) -> None:
        self.config = job.sampling.model_copy(update={"seed": 0})  # see `stream_id`
        self.prompt_tokens = 0
        self.failed = 0
        self.stopped = False
        self._has_drawn = False  # later draws may all fail: there are candidates already
        self._client, self._job, self._model, self._off = client, job, model, offer.off
        self._cutoff = cutoff
        self._loop = asyncio.get_running_loop()
        self._draws: set[asyncio.Task[object]] = set()
        self._logprobs: dict[tuple[str, float], tuple[TokenLogprob, ...]] = {}

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        """See `Source.draw`. Raises BackendError, or CancelledError once the job was stopped."""
        if self.stopped:  # the loop may be closed
            raise CancelledError
        drawing = self._draw_all(prompts, ks)
        return asyncio.run_coroutine_threadsafe(drawing, self._loop).result()

    def embed(self, group: Group) -> Floats:
        """Raise BonbonError: a server returns texts and no hidden states."""
        raise BonbonError(NO_EMBEDDING)

    def stop(self) -> None:
        """Cancel current and later draws. Called in the event loop's thread."""
        self.stopped = True
        for draw in self._draws:
            draw.cancel()

    def logprobs_of(self, group: Group, index: int) -> tuple[TokenLogprob, ...]:
        """Return a candidate's tokens, looked up by text: a strategy may reorder candidates."""
        return self._logprobs[group.completions[index], group.logprobs[index]]

    async def _draw_all(
        self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]
    ) -> list[Candidates]:
        task = asyncio.current_task()
        if self.stopped or task is None:
            raise asyncio.CancelledError
        self._draws.add(task)
        try:
            return [await self._draw(*one) for one in zip(prompts, ks, strict=True)]
        finally:
            self._draws.discard(task)

    async def _draw(self, prompt: EncodedPrompt, ks: range) -> Candidates:
        began = time.monotonic()
        losses: list[Cost] = []
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._candidate(k, losses)) for k in ks]
        outcomes = [task.result() for task in tasks]
        replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
        if not replies and not self._has_drawn:
            raise _error_of([outcome for outcome in outcomes if not isinstance(outcome, Reply)])
        self._note(replies, len(outcomes) - len(replies))
        lost = sum(losses, Cost(seconds=time.monotonic() - began))
        return candidates_of(prompt, replies, lost)

    async def _candidate(self, k: int, losses: list[Cost]) -> Reply | FaultError | BackendError:
        """Return candidate k or its error; the cost of unusable replies is added to `losses`."""

        def read(reply: Any) -> Reply:
            try:
                return read_reply(reply, self._job)
            except Exception:
                losses.append(spent_on(reply))
                raise

        body = request_body(self._job, self._model, self._off, k)
        try:
            return await self._client.post(path_of(self._job), body, read, self._cutoff)
        except (FaultError, BackendError) as error:
            return error

    def _note(self, replies: Sequence[Reply], failed: int) -> None:
        self.failed += failed
        for reply in replies:
            self._has_drawn = True
            self.prompt_tokens = max(self.prompt_tokens, reply.prompt_tokens)
            if reply.logprobs is not None:
                self._logprobs[reply.text, reply.logprob] = reply.logprobs


def _error_of(errors: Sequence[FaultError | BackendError]) -> BackendError:
    """Return the error of a job without candidates: the upstream's refusal if there is one."""
    refusals = (error for error in errors if isinstance(error, BackendError))
    faults = [error for error in errors if isinstance(error, FaultError)]
    return next(refusals, None) or error_of(faults)
