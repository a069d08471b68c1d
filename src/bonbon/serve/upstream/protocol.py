"""The requests that draw candidates from an upstream, and the reading of its replies.

Pure functions; `bonbon.serve.upstream.client` sends and receives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.remote.client import FaultError
from bonbon.remote.completions_api import (
    SEEDS,
    distribution,
    drawn_logprob,
    encodable,
    finish_reason,
    logprob_items,
    plausible_usage,
    read_logprob,
    read_usage,
    text_of,
)
from bonbon.sampling.cost import Candidates, Cost
from bonbon.serve.backend import AnswerJob, TokenLogprob

# Further fields of a job that change its distribution, each with its neutral value.
_RESHAPING: Mapping[str, Any] = MappingProxyType(
    {
        "frequency_penalty": 0,
        "logit_bias": {},
        "min_p": 0,
        "presence_penalty": 0,
        "repetition_penalty": 1,
        "response_format": {"type": "text"},
        "structured_outputs": {},
    }
)


# --- requests -------------------------------------------------------------------------------------


def path_of(job: AnswerJob) -> str:
    """Return the path that a job's requests go to."""
    return "completions" if isinstance(job.prompt, str) else "chat/completions"


def wants_logprobs(job: AnswerJob) -> bool:
    """Return whether a job's candidates need log-probabilities."""
    return job.logprobs is not None or job.strategy.needs_logprobs


def reshaping(extra: Mapping[str, Any]) -> list[str]:
    """Return the names of a job's further fields that change token probabilities."""
    return sorted(
        name for name, value in extra.items() if name in _RESHAPING and value != _RESHAPING[name]
    )


def request_body(job: AnswerJob, model: str, off: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Return the request for candidate k. The job's own fields override further ones (`extra`)."""
    body: dict[str, Any] = {**off, **job.extra, "model": model, "n": 1, "stream": False}
    body |= {"max_tokens": job.sampling.max_new_tokens, **distribution(job.sampling)}
    if job.seeded:
        body["seed"] = candidate_seed(job.sampling.seed, k)
    if job.stop:
        body["stop"] = list(job.stop)
    top = max(1, job.logprobs or 0)  # llama.cpp gives none at all for 0
    if isinstance(job.prompt, str):
        return body | {"prompt": job.prompt} | ({"logprobs": top} if wants_logprobs(job) else {})
    logprob_fields = {"logprobs": True, "top_logprobs": top} if wants_logprobs(job) else {}
    return body | {"messages": job.prompt} | logprob_fields


def candidate_seed(seed: int, k: int) -> int:
    """Return the seed of candidate k: the job's own for the first, a hash for the others.

    Not seed + k: jobs with the seeds 0 and 1 would then share all candidates but one.
    """
    if k == 0:
        return seed % SEEDS
    digest = hashlib.blake2b(f"{seed}\0{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SEEDS


# --- replies --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A candidate. `prefilled`: the prompt tokens that were not in the server's cache."""

    text: str
    finish_reason: str
    tokens: int
    prompt_tokens: int
    prefilled: int
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def logprob(self) -> float:
        """ln p of the drawn tokens, summed (nats); NaN if they were not asked for."""
        if self.logprobs is None:
            return math.nan
        return math.fsum(token.logprob for token in self.logprobs)


def read_reply(reply: Any, job: AnswerJob) -> Reply:
    """Read the candidate in a reply.

    The text is the message's content only: a reasoning model's thoughts are neither scored nor
    returned, though their tokens count. If the model did not finish thinking, the text is empty. A
    lone surrogate, which no encoding can hold, becomes a question mark.

    Raises FaultError for a reply that cannot be used: without a plausible `usage`, since its cost
    would be a guess; without the log-probabilities that were asked for; or with a finish reason
    other than stop or length. Raises LookupError, TypeError, ValueError or AttributeError for a
    value that is not a reply.
    """
    choice = reply["choices"][0]
    text, reason = text_of(choice), finish_reason(choice)
    usage = plausible_usage(reply)
    logprobs = None
    if wants_logprobs(job):
        logprobs = read_logprobs(choice.get("logprobs"), job.logprobs or 0)
        if logprobs is None:
            raise FaultError("its replies have no log-probabilities", lasting=True)
    return Reply(text, reason, usage.tokens, usage.prompt_tokens, usage.prefilled, logprobs)


def spent_on(reply: Any) -> Cost:
    """Return the cost of a reply that cannot be used, as far as the reply states it."""
    usage = read_usage(reply)
    return Cost() if usage is None else Cost(generated=usage.tokens, prefilled=usage.prefilled)


def read_logprobs(logprobs: Any, top: int) -> tuple[TokenLogprob, ...] | None:
    """Read each token with its `top` most likely ones, in either API's form; None if absent.

    Alternatives of probability 0 are left out. Raises FaultError for a value that is not ln p, and
    for a drawn token of probability 0.
    """
    items = logprob_items(logprobs)
    if items is None:
        return None
    return tuple(
        TokenLogprob(encodable(token), drawn_logprob(logprob), _best(others, top))
        for token, logprob, others in items
    )


def _best(pairs: Sequence[tuple[Any, Any]], top: int) -> tuple[tuple[str, float], ...]:
    tops = [(encodable(token), read_logprob(value)) for token, value in pairs]
    possible = [pair for pair in tops if pair[1] > -math.inf]
    return tuple(sorted(possible, key=lambda pair: -pair[1])[:top])


def candidates_of(prompt: EncodedPrompt, replies: Sequence[Reply], lost: Cost) -> Candidates:
    """Return replies to one prompt as a group; token ids are unknown, so each is −1.

    `lost` is the further cost of the draw.
    """
    group = Group(
        prompt_id=prompt.prompt_id,
        prompt=prompt.prompt,
        prompt_token_ids=(-1,) * max((reply.prompt_tokens for reply in replies), default=0),
        completions=tuple(reply.text for reply in replies),
        token_ids=tuple((-1,) * reply.tokens for reply in replies),
        logprobs=tuple(reply.logprob for reply in replies),
        finish_reasons=tuple(reply.finish_reason for reply in replies),
    )
    generated = sum(reply.tokens for reply in replies)
    prefilled = sum(reply.prefilled for reply in replies)
    return Candidates(group, Cost(generated, prefilled) + lost)
