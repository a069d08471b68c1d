"""Best-of-n on a model in this process.

One thread owns the model. It takes the job that has waited longest and, up to a budget of tokens,
all others with the same settings, and runs their strategy on them together. A draw is keyed by its
job and its number, not by its batch (`sampling.random_streams`), so an answer does not depend on
the other jobs. A job that arrives meanwhile waits for the next batch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from functools import partial

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.decoding.source import LocalSource
from bonbon.decoding.strategy import Generation
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.models.loading import context_length
from bonbon.rewards.reward import Reward
from bonbon.sampling.encoding import encode_prompts
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
from bonbon.serve.local.queue import EncodedJob, PendingJob, next_batch
from bonbon.serve.local.token_logprobs import completion_logprobs
from bonbon.system.errors import BonbonError

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0  # a reward that hangs cannot be stopped


class _StoppedError(Exception):
    """Raised in a batch that nobody waits for any more."""


class LocalBackend:
    """A `Backend` on a transformers model.

    Args:
        model: a causal language model in evaluation mode; nothing else may use it meanwhile.
        processing_class: its tokenizer.
        reward: what candidates are chosen by; None: only strategies that need none.
        name: the model's name in requests.
        max_batch_tokens: prompt and completion tokens drawn together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Tokenizer,
        reward: Reward | None,
        name: str,
        max_batch_tokens: int = 32_768,
    ) -> None:
        self.model = model
        self.tokenizer = processing_class
        self.reward = reward
        self.name = name
        self.max_batch_tokens = max_batch_tokens
        self._secret = secrets.token_hex(16)
        self._scoring = threading.Lock()
        self._changed = threading.Condition()
        self._arrived: list[PendingJob] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="bonbon-model", daemon=True)

    # --- the loop's side --------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the model's thread."""
        self._thread.start()

    async def models(self) -> tuple[str, ...]:
        """See `Backend.models`."""
        return (self.name,)

    async def healthy(self) -> bool:
        """Return whether the model's thread runs."""
        return self._thread.is_alive() and not self._closing

    async def close(self) -> None:
        """Stop the running batch and refuse waiting jobs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)

    async def answer(self, job: AnswerJob) -> Answer:
        """See `Backend.answer`."""
        check_job_has_reward(job, self.reward)
        if job.extra:
            raise bad_request(
                f"the local model takes no {', '.join(map(repr, sorted(job.extra)))}; leave it out",
                param=min(job.extra),
            )
        loop = asyncio.get_running_loop()
        pending = PendingJob(job, loop, loop.create_future())
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise _stopping()
            self._arrived.append(pending)
            self._changed.notify()
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                return await pending.answer
        except TimeoutError as error:
            raise out_of_time() from error
        finally:
            pending.given_up = True

    # --- the model's thread -----------------------------------------------------------------------

    def _work(self) -> None:
        queue: list[EncodedJob] = []
        while self._take_arrived(queue):
            batch = next_batch(queue, self.max_batch_tokens)
            if batch:
                self._run(batch)
        for encoded in queue:
            encoded.pending.settle(_stopping())

    def _take_arrived(self, queue: list[EncodedJob]) -> bool:
        """Wait for a job and take all that have arrived; return False when the backend closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._arrived or queue)
            arrived, self._arrived = self._arrived, []
        for pending in arrived:
            try:
                queue.append(EncodedJob(pending, self._encoded(pending.job)))
            except BackendError as error:
                pending.settle(error)
        return not self._closing

    def _encoded(self, job: AnswerJob) -> EncodedPrompt:
        row = PromptRow(stream_id(job, self._secret), job.prompt)
        if not isinstance(job.prompt, str) and self.tokenizer.chat_template is None:
            raise bad_request(
                f"the tokenizer of {self.name} has no chat template; send plain text to "
                "/v1/completions"
            )
        try:
            (prompt,) = encode_prompts([row], self.tokenizer, max_tokens=None)
        except BonbonError as error:
            message = str(error).replace(row.prompt_id, "of the request")
            message = message.replace(self.tokenizer.name_or_path or self.name, self.name)
            raise bad_request(message) from error
        except Exception as error:
            _log.exception("a prompt could not be encoded")
            raise BackendError(f"the prompt cannot be encoded: {type(error).__name__}") from error
        context, longest = context_length(self.model), job.sampling.max_new_tokens
        if context is not None and len(prompt.token_ids) + longest > context:
            raise bad_request(
                f"this model's context is {context} tokens; the prompt has {len(prompt.token_ids)} "
                f"and the completion may have {longest}; shorten the prompt or ask for fewer",
                "context_length_exceeded",
            )
        return prompt

    def _run(self, batch: list[EncodedJob]) -> None:
        """Answer a batch; if it fails as a whole, answer each of its jobs alone."""
        try:
            generations = self._generate(batch)
        except _StoppedError:
            for encoded in batch:
                encoded.pending.settle(_stopping() if self._closing else out_of_time())
        except Exception as error:  # strategies, rewards and models may raise anything
            if len(batch) == 1:
                batch[0].pending.settle(strategy_error(error))
            else:
                kind = type(error).__name__
                _log.warning("a batch of %d jobs failed (%s); each alone now", len(batch), kind)
                for encoded in batch:
                    self._run([encoded])
        else:
            for encoded, generation in zip(batch, generations, strict=True):
                encoded.pending.settle(self._answer(encoded, generation))

    def _generate(self, batch: list[EncodedJob]) -> list[Generation]:
        job = batch[0].pending.job
        settings = {"seed": 0, "max_batch_tokens": self.max_batch_tokens}
        sampling = job.sampling.model_copy(update=settings)

        def unwanted() -> bool:
            return self._closing or not any(encoded.pending.alive() for encoded in batch)

        def go_on(_: int = 0) -> None:
            if unwanted():
                raise _StoppedError

        go_on()
        source = LocalSource(self.model, self.tokenizer, sampling, job.stop, go_on)
        reward = None
        if job.strategy.needs_reward and self.reward is not None:
            reward = GuardedReward(self.reward, self._scoring, unwanted)
        return job.strategy.generate([encoded.prompt for encoded in batch], source, reward)

    def _answer(self, encoded: EncodedJob, generation: Generation) -> Answer | BackendError:
        job, group = encoded.pending.job, generation.group
        logprobs = None
        if job.logprobs is not None:
            logprobs = partial(
                completion_logprobs, self.model, self.tokenizer, job.sampling, group, job.logprobs
            )
        try:
            return answer_of(job, generation, len(group.prompt_token_ids), logprobs)
        except Exception as error:
            return strategy_error(error)


def _stopping() -> BackendError:
    return BackendError("the server is stopping", 503)
