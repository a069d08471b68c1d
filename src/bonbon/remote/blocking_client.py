"""A server as synchronous stages ask it: many requests, so many at a time, all of them answered."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from bonbon.config.sampling import ServerSettings
from bonbon.remote.client import Client, FaultError, Pauses, RefusedError
from bonbon.remote.completions_api import Offer, read_offer
from bonbon.remote.endpoints import Endpoint, checked_endpoint, redacted
from bonbon.system.errors import BonbonError, UnavailableError

T = TypeVar("T")
U = TypeVar("U")

_END = object()


@dataclass(frozen=True)
class Request(Generic[T]):
    """Something to ask: where, what, how the reply is read (see `Client.post`), and its name."""

    name: str  # for errors: which prompt or completion it is about
    path: str
    body: dict[str, Any]
    read: Callable[[Any], T]


class RefusedRequestError(BonbonError):
    """A server refuses a request and would again.

    `about_request`: for what that very request holds, so that others may fare better.
    """

    def __init__(self, message: str, about_request: bool) -> None:
        super().__init__(message)
        self.about_request = about_request


class RefusedServerError(RefusedRequestError, UnavailableError):
    """A server that refuses whatever it is asked."""


class BlockingClient:
    """A `Client`, asked from any thread, with or without an event loop running in it.

    The connections live in a loop and a thread of their own until `close`. The arguments are those
    of `Client`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float,
        retries: int,
        concurrency: int,
        pauses: Pauses | None = None,
    ) -> None:
        async def connected() -> Client:
            return Client(
                endpoint, timeout=timeout, retries=retries, concurrency=concurrency, pauses=pauses
            )

        self.endpoint = endpoint
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="bonbon-server", daemon=True
        )
        self._thread.start()
        self._client = self._wait(connected())

    def close(self) -> None:
        """Give up what is asked and close the connections. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._wait(self._ended())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stop(self) -> None:
        """See `Client.stop`."""
        self._loop.call_soon_threadsafe(self._client.stop)

    def post(
        self, path: str, body: dict[str, Any], read: Callable[[Any], T], cutoff: float = math.inf
    ) -> T:
        """See `Client.post`. Raises CancelledError, of `concurrent.futures`, when it is closed."""
        return self._wait(self._client.post(path, body, read, cutoff))

    async def _ended(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    def _wait(self, work: Coroutine[Any, Any, U]) -> U:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Server(BlockingClient):
    """A server, asked from any thread, with or without an event loop running in it.

    `section` is what errors call the settings.

    Raises BonbonError when the address or the key cannot be used.
    """

    def __init__(self, settings: ServerSettings, section: str) -> None:
        self.settings = settings
        self._section = section
        super().__init__(
            checked_endpoint(settings.base_url, settings.api_key_env, section),
            timeout=settings.client.timeout,
            retries=settings.client.retries,
            concurrency=settings.concurrency,
        )

    def offer(self) -> Offer:
        """Return what the server has.

        A server of one model may list none, if the settings name it. Raises BonbonError when it
        does not say.
        """
        try:
            return self._wait(self._client.get("models", read_offer))
        except RefusedError as refusal:
            if refusal.status == 404 and self.settings.model is not None:
                return Offer((self.settings.model,), {})
            raise self._error("its models", refusal) from refusal
        except FaultError as fault:  # no request is at fault
            reason = redacted(str(fault), self.endpoint.secret)
            raise UnavailableError(
                f"the server at {self.settings.base_url} did not give its models: {reason}; wait "
                f"until it answers, or correct {self._section}.base_url"
            ) from fault

    def ask_all(
        self, requests: Sequence[Request[T]], each: Callable[[T], Any] | None = None
    ) -> list[T]:
        """The answer to each request, in their order; at most `settings.concurrency` at a time.

        A request's deadline begins when its turn comes. `each` is called with every answer as it
        comes, in the calling thread.

        Raises BonbonError, naming the request and the reason, as soon as one has no answer; what
        is under way is then given up.
        """
        arrived: SimpleQueue[Any] = SimpleQueue()
        work = self._answers(requests, arrived.put)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.add_done_callback(lambda _: arrived.put(_END))
        try:
            while (answer := arrived.get()) is not _END:
                if each is not None:
                    each(answer)
            return future.result()
        finally:
            future.cancel()  # does nothing to what is done

    # --- in the loop's thread ---------------------------------------------------------------------

    async def _answers(self, requests: Sequence[Request[T]], note: Callable[[T], Any]) -> list[T]:
        answers: dict[int, T] = {}
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for index, request in waiting:
                answers[index] = await self._answer(request)
                note(answers[index])

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.concurrency, len(requests))):
                    group.create_task(work())
        except ExceptionGroup as errors:  # the others were cancelled, or say the same
            raise errors.exceptions[0] from None
        return [answers[index] for index in range(len(requests))]

    async def _answer(self, request: Request[T]) -> T:
        cutoff = time.monotonic() + self.settings.client.deadline
        try:
            return await self._client.post(request.path, request.body, request.read, cutoff)
        except (FaultError, RefusedError) as error:
            raise self._error(request.name, error) from error

    # --- errors -----------------------------------------------------------------------------------

    def _error(self, name: str, error: FaultError | RefusedError) -> BonbonError:
        where = f"the server at {self.settings.base_url}"
        reason = redacted(str(error), self.endpoint.secret)
        if isinstance(error, RefusedError):
            message = f"{where} refuses {name}: {reason}"
            refused = RefusedRequestError if error.about_request else RefusedServerError
            return refused(message, error.about_request)
        again = "" if error.lasting else f"; {self._retry_hint(error)}"
        # What is slow or lasts may be the request's own doing.
        kind = BonbonError if error.lasting or error.slow else UnavailableError
        return kind(f"{where} did not give {name}: {reason}{again}")

    def _retry_hint(self, fault: FaultError) -> str:
        if fault.retry_after:
            return f"it asks for {fault.retry_after:g} seconds until the next try"
        section, client = f"{self._section}.client", self.settings.client
        return (
            f"it was given {section}.retries = {client.retries} further tries of "
            f"{section}.timeout = {client.timeout:g} and {section}.deadline = "
            f"{client.deadline:g} seconds"
        )
