"""Parts that the backends share: errors, random streams, guarded rewards, answers."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bonbon.decoding.catalogue import strategy_name
from bonbon.decoding.strategy import Generation
from bonbon.groups.group import Prompt
from bonbon.serve.backend import Answer, AnswerJob, BackendError, Choice, TokenLogprob
from bonbon.system.errors import BonbonError, UserCodeError

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward

_log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 1000  # characters
_TURN_SECONDS = 0.2  # between checks of whether anyone still waits for the reward


def bad_request(message: str, code: str | None = None, param: str | None = None) -> BackendError:
    """Return the error of a request that would fail again if repeated."""
    message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}…"
    return BackendError(message, 400, "invalid_request_error", code, param)


def out_of_time(message: str = "there was no answer within the request's time") -> BackendError:
    """Return the error of a job whose deadline has passed."""
    return BackendError(message, 504, "timeout_error", "timeout")


def check_job_has_reward(job: AnswerJob, reward: Reward | None) -> None:
    """Raise BackendError when the job's strategy needs a reward and there is none."""
    if job.strategy.needs_reward and reward is None:
        raise bad_request(
            f"the strategy {strategy_name(job.strategy)} needs a reward and this server has none; "
            "start it with one, or choose a strategy that needs none, such as self_consistency"
        )


def stream_id(job: AnswerJob, server_secret: str) -> str:
    """Return the prompt id that keys a job's random streams; all jobs share one stream seed.

    Jobs with the same seed and prompt get the same id. A job without a seed gets an id of its own,
    which cannot be guessed without this server's secret.
    """
    name = [job.sampling.seed, job.prompt] if job.seeded else [server_secret, job.request_id]
    text = json.dumps(name, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def user_code_error(what: str, error: Exception) -> BackendError:
    """Return the error of a failure in the operator's own code, without the exception's message.

    The message may hold prompts and keys, so clients and the log get only the exception's class;
    the log also names the line that raised it.
    """
    cause = error.__cause__ or error
    frames = traceback.extract_tb(cause.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    _log.error("%s failed: %s%s", what, type(cause).__name__, place)
    return BackendError(f"{what} failed: {type(cause).__name__}")


def strategy_error(error: Exception) -> BackendError:
    """Return the error of a strategy that raised: the request's fault, or the server's code's."""
    if isinstance(error, BackendError):
        return error
    if isinstance(error, BonbonError) and not isinstance(error, UserCodeError):
        return bad_request(str(error))
    return user_code_error("the strategy", error)


@dataclass(frozen=True)
class GuardedReward:
    """A reward that is called one call at a time, since users' functions may not be thread-safe.

    Raises BackendError (500) if the reward fails or is not finite, so that every BonbonError of a
    strategy is about the request. Raises BackendError (504) once `stopped` returns True: nobody
    waits for the reward any more.
    """

    reward: Reward
    lock: threading.Lock
    stopped: Callable[[], bool]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """See `bonbon.rewards.reward.Reward`."""
        while not self.lock.acquire(timeout=_TURN_SECONDS):
            if self.stopped():
                raise out_of_time()
        try:
            if self.stopped():
                raise out_of_time()
            rewards = np.asarray(self.reward(prompts, completions), dtype=np.float64)
        except BackendError:
            raise
        except Exception as error:  # a user's code: anything may come out of it
            raise user_code_error("the reward", error) from error
        finally:
            self.lock.release()
        if rewards.shape != (len(completions),):
            raise BackendError(
                f"the reward returned shape {rewards.shape} for {len(completions)} completions; it "
                "must return one number each"
            )
        if not np.isfinite(rewards).all():
            raise BackendError("the reward returned a NaN or an infinity; it must be finite")
        return rewards


def answer_of(
    job: AnswerJob,
    generation: Generation,
    prompt_tokens: int,
    logprobs: Callable[[int], tuple[TokenLogprob, ...]] | None,
    failed: int = 0,
) -> Answer:
    """Return the best `job.choices` candidates of a generation as an answer.

    `logprobs` maps a candidate's index to the log-probabilities of its tokens.
    """
    group = generation.group
    choices = tuple(
        Choice(
            index=index,
            text=group.completions[index],
            finish_reason=group.finish_reasons[index],
            reward=None if group.rewards is None else group.rewards[index],
            logprobs=None if logprobs is None else logprobs(index),
        )
        for index in generation.ranking()[: job.choices]
    )
    return Answer(choices, prompt_tokens, generation.cost, generation, failed)
