"""The local model's queue of jobs, and how they are grouped into batches."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from bonbon.groups.prompts import EncodedPrompt
from bonbon.serve.backend import Answer, AnswerJob, BackendError


@dataclass(eq=False)
class PendingJob:
    """A job and the future of its answer.

    `given_up` is set by the event loop's thread and read by the model's.
    """

    job: AnswerJob
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Answer]
    given_up: bool = False

    def alive(self) -> bool:
        """Return whether anyone still waits for the answer."""
        return not self.given_up and time.monotonic() < self.job.deadline

    def settle(self, outcome: Answer | BackendError) -> None:
        """Pass the outcome to the event loop; callable from any thread."""
        try:
            self.loop.call_soon_threadsafe(self._settle, outcome)
        except RuntimeError:  # the loop is closed
            self.given_up = True

    def _settle(self, outcome: Answer | BackendError) -> None:
        if self.answer.done():
            return
        if isinstance(outcome, BackendError):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


@dataclass(frozen=True, eq=False)
class EncodedJob:
    """A pending job with its tokenised prompt."""

    pending: PendingJob
    prompt: EncodedPrompt

    def kind(self) -> tuple[Any, ...]:
        """Return what jobs of a batch must share: all but the seed, which is in the prompt's id."""
        job = self.pending.job
        return job.strategy, job.sampling.model_copy(update={"seed": 0}), job.stop

    def tokens(self) -> int:
        """Return the largest number of tokens of all candidates, each with its prompt."""
        sampling = self.pending.job.sampling
        return sampling.n * (len(self.prompt.token_ids) + sampling.max_new_tokens)


def next_batch(queue: list[EncodedJob], max_tokens: int) -> list[EncodedJob]:
    """Take the first job and others of its kind, up to `max_tokens`; drop abandoned jobs."""
    alive = [encoded for encoded in queue if encoded.pending.alive()]
    batch: list[EncodedJob] = []
    left: list[EncodedJob] = []
    total = 0
    for encoded in alive:
        total_with = total + encoded.tokens()
        fits = not batch or total_with <= max_tokens
        if fits and (not batch or encoded.kind() == batch[0].kind()):
            batch.append(encoded)
            total = total_with
        else:
            left.append(encoded)
    queue[:] = left
    return batch
