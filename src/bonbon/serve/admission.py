"""Which jobs run, which wait, and which are turned away."""

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

_RECENT = 32  # jobs that the time of the next ones is told from
_FIRST_GUESS = 1.0  # seconds a job, before there was one


class Admission:
    """At most `concurrency` jobs run and `queue` wait, first come, first served.

    Belongs to one event loop.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self.concurrency = concurrency
        self.queue = queue
        self.stopping = False
        self._running: dict[Ticket, float] = {}  # since when
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
        """A ticket for each job of a request, or BackendError: all of them come in or none.

        All are given back at the end.
        """
        self._check_room(jobs)
        mine = [self._join() for _ in range(jobs)]
        try:
            yield mine
        finally:
            for ticket in mine:
                self.leave(ticket)

    async def turn(self, ticket: Ticket) -> None:
        """Wait until the job may run. Raises BackendError when the server stops before."""
        await ticket
        if ticket not in self._running:
            raise stopping()

    def leave(self, ticket: Ticket) -> None:
        """Give a ticket back, in whatever state it is; the next job's turn comes."""
        since = self._running.pop(ticket, None)
        if since is not None:
            self._recent.append(time.monotonic() - since)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        while self._waiting and self.running < self.concurrency:
            self._start(self._waiting.popleft())

    def stop(self) -> None:
        """Turn away what waits and whatever comes; what runs goes on."""
        self.stopping = True
        while self._waiting:
            _settle(self._waiting.popleft())

    def retry_after(self) -> float:
        """Seconds until a job that comes now would have its turn, at least 1."""
        recent = self._recent or (_FIRST_GUESS,)
        mean = math.fsum(recent) / len(recent)
        return max(1.0, mean * (self.waiting + 1) / self.concurrency)

    def check_size(self, jobs: int) -> None:
        """Raise BackendError for a request of more jobs than could ever come in."""
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
