"""Admission control: which jobs run, which wait, and which are refused."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from bonbon.serve.answers import bad_request
from bonbon.serve.api.errors import stopping
from bonbon.serve.backend import BackendError

# A place in the queue; done when the job may run.
Ticket = asyncio.Future[None]

_RECENT = 32  # finished jobs from which the waiting time is estimated
_FIRST_GUESS = 1.0  # seconds a job, before the first one is finished


class Admission:
    """A first-come, first-served queue: at most `concurrency` jobs run and `queue` jobs wait.

    Belongs to one event loop.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self.concurrency = concurrency
        self.queue = queue
        self.stopping = False
        self._running: dict[Ticket, float] = {}  # start times
        self._waiting: deque[Ticket] = deque()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    @property
    def running(self) -> int:
        """The number of jobs that run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return len(self._waiting)

    @contextmanager
    def tickets(self, jobs: int) -> Iterator[list[Ticket]]:
        """Yield one ticket a job for the jobs of a request, and give all back at the end.

        Raises BackendError, and admits no job, when there is no room for all of them.
        """
        self._check_room(jobs)
        mine = [self._join() for _ in range(jobs)]
        try:
            yield mine
        finally:
            for ticket in mine:
                self.leave(ticket)

    async def turn(self, ticket: Ticket) -> None:
        """Wait until the job may run. Raises BackendError if the server stops first."""
        await ticket
        if ticket not in self._running:
            raise stopping()

    def leave(self, ticket: Ticket) -> None:
        """Give a ticket back, whatever its state, and start the next job."""
        since = self._running.pop(ticket, None)
        if since is not None:
            self._recent.append(time.monotonic() - since)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        while self._waiting and self.running < self.concurrency:
            self._start(self._waiting.popleft())

    def stop(self) -> None:
        """Refuse waiting and new jobs; running jobs continue."""
        self.stopping = True
        while self._waiting:
            _settle(self._waiting.popleft())

    def retry_after(self) -> float:
        """Estimate the seconds until a job that arrives now could start, at least 1."""
        recent = self._recent or (_FIRST_GUESS,)
        mean = math.fsum(recent) / len(recent)
        return max(1.0, mean * (self.waiting + 1) / self.concurrency)

    def check_size(self, jobs: int) -> None:
        """Raise BackendError for a request of more jobs than could ever be admitted."""
        if jobs > self.concurrency + self.queue:
            raise bad_request(
                f"at most {self.concurrency + self.queue} prompts a request; send them in several",
                param="prompt",
            )

    def _check_room(self, jobs: int) -> None:
        if self.stopping:
            raise stopping()
        self.check_size(jobs)
        must_wait = max(0, jobs - (self.concurrency - self.running))
        if self.waiting + must_wait > self.queue:
            raise BackendError(
                f"{self.waiting} jobs are waiting, and no more than {self.queue} may; try again",
                429,
                "rate_limit_error",
                "rate_limit_exceeded",
                retry_after=self.retry_after(),
            )

    def _join(self) -> Ticket:
        ticket: Ticket = asyncio.get_running_loop().create_future()
        if self.running < self.concurrency:
            self._start(ticket)
        else:
            self._waiting.append(ticket)
        return ticket

    def _start(self, ticket: Ticket) -> None:
        self._running[ticket] = time.monotonic()
        _settle(ticket)


def _settle(ticket: Ticket) -> None:
    if not ticket.done():  # a job that was cancelled while it waited has cancelled its ticket
        ticket.set_result(None)
