"""Drawing a job's candidates from an upstream, out of the thread that its strategy runs in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from bonbon.decoding.strategy import Candidates, Floats
from bonbon.errors import BonbonError
from bonbon.groups import Group
from bonbon.prompts import EncodedPrompt
from bonbon.serve.backend import Job, TokenLogprob
from bonbon.serve.upstream_client import UpstreamClient, error_of
from bonbon.serve.upstream_protocol import (
    FaultError,
    Offer,
    Reply,
    candidates_of,
    path_of,
    read_reply,
    request_body,
)


class UpstreamSource:
    """A `Source` for one job: its strategy's thread draws from the upstream through the loop."""

    def __init__(
        self, client: UpstreamClient, job: Job, model: str, offer: Offer, cutoff: float
    ) -> None:
        self.config = job.sampling.model_copy(update={"seed": 0})  # see `stream_id`
        self.prompt_tokens = 0
        self.failed = 0
        self.stopped = False
        self._has_drawn = False  # of a job's later draws all may fail: there is an answer already
        self._client, self._job, self._model, self._off = client, job, model, offer.off
        self._cutoff = cutoff
        self._loop = asyncio.get_running_loop()
        self._draws: set[asyncio.Task[object]] = set()
        self._logprobs: dict[tuple[str, float], tuple[TokenLogprob, ...]] = {}

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        """See `Source.draw`. Raises BackendError, or CancelledError once the job was stopped."""
        drawing = self._draw_all(prompts, ks)
        return asyncio.run_coroutine_threadsafe(drawing, self._loop).result()

    def embed(self, group: Group) -> Floats:
        """Raises BonbonError: a server gives texts and no states."""
        raise BonbonError(
            "an upstream server embeds no completions; set the strategy's `distance` or `embedding`"
            " to one of texts, or take a local model"
        )

    def stop(self) -> None:
        """Give up what is being drawn, and all that would be. Called in the loop's thread."""
        self.stopped = True
        for draw in self._draws:
            draw.cancel()

    def logprobs_of(self, group: Group, index: int) -> tuple[TokenLogprob, ...]:
        """The tokens of a candidate. A strategy may have put the candidates in another order."""
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
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._candidate(k)) for k in ks]
        except BaseExceptionGroup as errors:  # one refusal: the others would be refused as well
            raise errors.exceptions[0] from None
        outcomes = [task.result() for task in tasks]
        replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
        faults = [outcome for outcome in outcomes if isinstance(outcome, FaultError)]
        if not replies and not self._has_drawn:
            raise error_of(faults)
        self._note(replies, len(faults))
        return candidates_of(prompt, replies, time.monotonic() - began)

    async def _candidate(self, k: int) -> Reply | FaultError:
        job = self._job
        body = request_body(job, self._model, self._off, k)
        try:
            return await self._client.post(
                path_of(job), body, lambda found: read_reply(found, job), self._cutoff
            )
        except FaultError as fault:
            return fault

    def _note(self, replies: Sequence[Reply], failed: int) -> None:
        self.failed += failed
        for reply in replies:
            self._has_drawn = True
            self.prompt_tokens = max(self.prompt_tokens, reply.prompt_tokens)
            if reply.logprobs is not None:
                self._logprobs[reply.text, reply.logprob] = reply.logprobs
