"""Best-of-n in front of any OpenAI-compatible server: vLLM, SGLang, llama.cpp, a hosted one.

Each candidate of a job is a request of its own, so that one failure does not affect the others. A
share of the job's time is kept for scoring; candidates that have not arrived by then are dropped,
and `Answer.failed` counts them. The rest are then biased draws: long completions are missing. The
cost leaves out the tokens of replies that broke off, since their number is not known.

A strategy is synchronous code. It runs in a thread and draws through the event loop. Each job has
a thread of its own, since a reward that hangs blocks it; no thread keeps the process alive.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from bonbon.decoding.catalogue import strategy_name
from bonbon.decoding.distances import EMBEDDING
from bonbon.decoding.strategy import Generation
from bonbon.groups.prompts import EncodedPrompt
from bonbon.remote.client import FaultError
from bonbon.remote.completions_api import Offer, read_offer
from bonbon.serve.answers import (
    GuardedReward,
    answer_of,
    bad_request,
    check_job_has_reward,
    out_of_time,
    strategy_error,
    stream_id,
)
from bonbon.serve.backend import Answer, AnswerJob, BackendError
from bonbon.serve.upstream.client import UpstreamClient, UpstreamConfig, upstream_error
from bonbon.serve.upstream.protocol import reshaping
from bonbon.serve.upstream.source import NO_EMBEDDING, UpstreamSource

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward

T = TypeVar("T")

# Seconds: the largest age of an offer (a list of models) for a job and for a health check, and how
# long a job that has another model name waits for a new offer.
_OFFER_AGE = 30.0
_HEALTH_AGE = 1.0
_PATIENCE = 5.0


class UpstreamBackend:
    """A `Backend` in front of an OpenAI-compatible server.

    The upstream's log-probabilities are passed on unchanged. A strategy that uses them as weights
    needs those under the sampling settings: see `UpstreamConfig.processed_logprobs`.
    """

    def __init__(self, config: UpstreamConfig, reward: Reward | None) -> None:
        self.config = config
        self.reward = reward
        self._secret = secrets.token_hex(16)
        self._scoring = threading.Lock()
        self._sources: set[UpstreamSource] = set()
        self._client: UpstreamClient | None = None
        self._offered: tuple[float, Offer] | None = None
        self._silent_until = 0.0  # until then jobs use the old offer
        self._asking: asyncio.Task[Offer] | None = None

    async def start(self) -> None:
        """Create the client. Raises BonbonError when the address or the key cannot be used.

        The upstream may start later; until then jobs fail and `healthy` returns False.
        """
        self._client = UpstreamClient(self.config)

    async def models(self) -> tuple[str, ...]:
        """See `Backend.models`. Raises BackendError when the upstream never named its models."""
        if self.config.model is not None:
            return (self.config.model,)
        return (await self._job_offer()).models

    async def healthy(self) -> bool:
        """Return whether the upstream names its models now."""
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._offer(_HEALTH_AGE)
        except (TimeoutError, BackendError):
            return False
        return True

    async def close(self) -> None:
        """Stop all jobs and close the connections."""
        for source in list(self._sources):
            source.stop()
        if self._asking is not None:
            self._asking.cancel()
        if self._client is not None:
            await self._client.close()

    async def answer(self, job: AnswerJob) -> Answer:
        """See `Backend.answer`."""
        self._check(job)
        now = time.monotonic()
        cutoff = job.deadline - self.config.scoring_share * max(0.0, job.deadline - now)
        try:
            async with asyncio.timeout(job.deadline - now):
                return await self._answer(job, cutoff)
        except TimeoutError as error:
            raise out_of_time() from error

    def _check(self, job: AnswerJob) -> None:
        name = strategy_name(job.strategy)
        check_job_has_reward(job, self.reward)
        if job.strategy.stepwise:
            raise bad_request(
                f"the strategy {name} drops or branches completions while they are drawn, which an "
                "upstream server cannot do; take a local model, or a strategy such as best_of_n"
            )
        of_source = getattr(job.strategy, "embedding", "") is None
        if of_source and getattr(job.strategy, "distance", None) == EMBEDDING:
            raise bad_request(NO_EMBEDDING)
        changed = _changed_distribution(job)
        if job.strategy.needs_logprobs and changed and not self.config.processed_logprobs:
            raise bad_request(
                f"the strategy {name} needs log-probabilities under the sampling settings, and the "
                f"upstream gives those of the model itself; leave out {', '.join(changed)}, or "
                "have it give processed ones and set upstream.processed_logprobs"
            )

    async def _answer(self, job: AnswerJob, cutoff: float) -> Answer:
        offer = await self._job_offer()
        assert self._client is not None
        model = self.config.model or job.model or offer.models[0]
        source = UpstreamSource(self._client, job, model, offer, cutoff)
        self._sources.add(source)
        try:
            generation = await _in_thread(partial(self._generate, job, source))
        finally:
            source.stop()
            self._sources.discard(source)
        logprobs = None
        if job.logprobs is not None:
            logprobs = partial(source.logprobs_of, generation.group)
        return answer_of(job, generation, source.prompt_tokens, logprobs, source.failed)

    def _generate(self, job: AnswerJob, source: UpstreamSource) -> Generation:
        """Run the strategy, in a thread."""
        prompt = EncodedPrompt(stream_id(job, self._secret), job.prompt, ())
        reward = None
        if job.strategy.needs_reward and self.reward is not None:
            reward = GuardedReward(self.reward, self._scoring, lambda: source.stopped)
        try:
            return job.strategy.generate([prompt], source, reward)[0]
        except CancelledError as error:  # only when the backend closes
            raise BackendError("the server is stopping", 503) from error
        except Exception as error:
            raise strategy_error(error) from error
        except SystemExit as error:  # raised by a user's code; it would end the server
            raise BackendError("the strategy failed: SystemExit") from error

    async def _job_offer(self) -> Offer:
        """Return the offer for a job: a new one, an old one, or the configured model.

        Raises BackendError if there is none.
        """
        if self._offered is not None and time.monotonic() < self._silent_until:
            return self._offered[1]
        try:
            async with asyncio.timeout(_PATIENCE if self._known() else None):
                return await self._offer(_OFFER_AGE)
        except (TimeoutError, BackendError):
            known = self._known()
            if known is None:
                raise
        self._silent_until = time.monotonic() + _OFFER_AGE
        return known

    def _known(self) -> Offer | None:
        if self._offered is not None:
            return self._offered[1]
        return None if self.config.model is None else Offer((self.config.model,), {})

    async def _offer(self, age: float) -> Offer:
        """Return an offer of at most `age` seconds ago; concurrent callers share one request.

        Raises BackendError when the upstream does not name its models.
        """
        if self._offered is not None and time.monotonic() < self._offered[0] + age:
            return self._offered[1]
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_offer())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._asking)

    async def _ask_offer(self) -> Offer:
        assert self._client is not None, "start() comes first"
        try:
            offer = await self._client.get("models", read_offer)
        except FaultError as fault:
            asked_for = fault.retry_after or None
            message = f"the upstream does not name its models: {fault}"
            raise upstream_error(message, asked_for) from fault
        except BackendError as error:
            if error.status != 404 or self.config.model is None:
                raise
            offer = Offer((self.config.model,), {})  # a server of one model that lists none
        self._offered = time.monotonic(), offer
        return offer


def _changed_distribution(job: AnswerJob) -> list[str]:
    """Return the fields of a job that make its log-probabilities differ from the model's own.

    Empty at top-k 1: all candidates are the same, so their weights do not matter.
    """
    sampling = job.sampling
    if sampling.top_k == 1:
        return []
    changed = {
        "temperature": sampling.temperature != 1,
        "top_p": sampling.top_p < 1,
        "top_k": sampling.top_k > 0,
    }
    return [name for name in changed if changed[name]] + reshaping(job.extra)


async def _in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that does not keep the process alive; return or raise its outcome."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # given up
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="bonbon-strategy", daemon=True).start()
    return await future
