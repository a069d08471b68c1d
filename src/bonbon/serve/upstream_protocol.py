"""The requests that candidates are drawn by, and what the replies mean.

Pure functions; `bonbon.serve.upstream_client` sends and receives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from bonbon.config import SamplingConfig
from bonbon.decoding.strategy import Candidates, Cost
from bonbon.endpoints import message_text
from bonbon.groups import Group
from bonbon.prompts import EncodedPrompt
from bonbon.serve.backend import Job, TokenLogprob

# What servers add to a request that leaves it out (a model's recommended settings, or their own),
# turned off: a job's sampling settings are the whole of the distribution. By `owned_by` of /models.
_OFF: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vllm": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
        "bonbon": {"top_k": 0, "best_of": 1},  # which would choose by its own reward as well
    }
)
# Further fields of a job that change its distribution, each with the value that does not.
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
_SEEDS = 2**31  # every server takes these
_MOST_TOKENS = 2**24  # of a prompt or a completion; beyond the longest context there is


class FaultError(Exception):
    """A candidate that a try did not bring.

    `retry_after`: seconds that the server asks for. `slow`: time ran out. `lasting`: another try
    would bring the same.
    """

    def __init__(
        self, why: str, retry_after: float = 0.0, slow: bool = False, lasting: bool = False
    ) -> None:
        super().__init__(why)
        self.retry_after = retry_after
        self.slow = slow
        self.lasting = lasting


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What an upstream has: its models' names, and the settings that keep its own ones out."""

    models: tuple[str, ...]
    off: Mapping[str, Any]


def read_offer(found: Any) -> Offer:
    """An offer from the reply of /models. Raises as `read_reply` does, also when it has none."""
    models = found["data"]
    owner = models[0].get("owned_by")
    return Offer(tuple(str(model["id"]) for model in models), _OFF.get(str(owner), {}))


def path_of(job: Job) -> str:
    """Where a job's candidates are asked for."""
    return "completions" if isinstance(job.prompt, str) else "chat/completions"


def wants_logprobs(job: Job) -> bool:
    """Whether a job's candidates have to come with their log-probabilities."""
    return job.logprobs is not None or job.strategy.needs_logprobs


def reshaping(extra: Mapping[str, Any]) -> list[str]:
    """Those of a job's further fields under which tokens have other probabilities."""
    return sorted(
        name for name, value in extra.items() if name in _RESHAPING and value != _RESHAPING[name]
    )


def request_body(job: Job, model: str, off: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The request for candidate k alone. The job's own fields win over further ones (`extra`)."""
    body: dict[str, Any] = {**off, **job.extra, "model": model, "n": 1, "stream": False}
    body |= {"max_tokens": job.sampling.max_new_tokens, **_distribution(job.sampling)}
    if job.seeded:
        body["seed"] = candidate_seed(job.sampling.seed, k)
    if job.stop:
        body["stop"] = list(job.stop)
    top = max(1, job.logprobs or 0)  # llama.cpp gives none at all for 0
    if isinstance(job.prompt, str):
        return body | {"prompt": job.prompt} | ({"logprobs": top} if wants_logprobs(job) else {})
    asked = {"logprobs": True, "top_logprobs": top} if wants_logprobs(job) else {}
    return body | {"messages": job.prompt} | asked


def _distribution(sampling: SamplingConfig) -> dict[str, Any]:
    if sampling.top_k == 1:  # the most likely token; top_k is not in OpenAI's API
        return {"temperature": 0.0, "top_p": 1.0}
    cut = {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, **cut}


def candidate_seed(seed: int, k: int) -> int:
    """The seed of candidate k: the job's own for the first, a hash for the others.

    Not seed + k: jobs with the seeds 0 and 1 would then share all candidates but one.
    """
    if k == 0:
        return seed % _SEEDS
    digest = hashlib.blake2b(f"{seed}\0{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _SEEDS


# --- replies --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A candidate. `prefilled` are the prompt tokens that were not found in the server's cache."""

    text: str
    finish_reason: str
    tokens: int
    prompt_tokens: int
    prefilled: int
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def logprob(self) -> float:
        """ln p of the drawn tokens, summed (nats); NaN where the server was not asked."""
        if self.logprobs is None:
            return math.nan
        return math.fsum(token.logprob for token in self.logprobs)


def read_reply(found: Any, job: Job) -> Reply:
    """The candidate in a reply.

    The text is the message's content alone: a reasoning model's thoughts are neither scored nor
    returned, though their tokens count; where it did not get beyond them the text is empty. A lone
    surrogate, which no encoding can hold, becomes a question mark.

    Raises FaultError for a reply that is no use: without a plausible `usage`, as what it cost would
    be a guess; without the log-probabilities that were asked for; or one that ended in another way
    than at its end or its limit. Raises LookupError, TypeError, ValueError or AttributeError for
    what is no reply at all.
    """
    choice = found["choices"][0]
    if isinstance(job.prompt, str):
        text = choice["text"]
        if not isinstance(text, str):
            raise TypeError("text")
    else:
        text = message_text(choice["message"].get("content"))
    reason = _finish_reason(choice.get("finish_reason"))
    usage = _usage(found)
    if usage is None:
        raise FaultError("its replies do not say how many tokens they took (`usage`)", lasting=True)
    logprobs = None
    if wants_logprobs(job):
        logprobs = read_logprobs(choice.get("logprobs"), job.logprobs or 0)
        if logprobs is None:
            raise FaultError("its replies have no log-probabilities", lasting=True)
    return Reply(_encodable(text), reason, *usage, logprobs)


def spent_on(found: Any) -> Cost:
    """What a reply cost that is no use, as far as it says so."""
    usage = _usage(found)
    if usage is None:
        return Cost()
    tokens, _, prefilled = usage
    return Cost(generated=tokens, prefilled=prefilled)


def _finish_reason(found: Any) -> str:
    if found in ("stop", "length"):
        return str(found)
    # Such a candidate is no draw of the model. Another try might bring one after "abort", but
    # would get around a filter.
    lasting = found in ("content_filter", "tool_calls", "function_call")
    raise FaultError(f"a candidate ended with finish_reason {found!r:.40}", lasting=lasting)


def _usage(found: Any) -> tuple[int, int, int] | None:
    """Tokens of the completion, of the prompt, and of the prompt less what was cached.

    None where a reply does not say, or nothing that can be.
    """
    usage = _field(found, "usage")
    tokens, prompt_tokens = _field(usage, "completion_tokens"), _field(usage, "prompt_tokens")
    if not _is_count(tokens) or not _is_count(prompt_tokens):
        return None
    cached = _field(_field(usage, "prompt_tokens_details"), "cached_tokens")
    return tokens, prompt_tokens, max(0, prompt_tokens - (cached if _is_count(cached) else 0))


def _field(found: Any, name: str) -> Any:
    return found.get(name) if isinstance(found, dict) else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS


def _encodable(text: Any) -> str:
    return str(text).encode(errors="replace").decode()


def read_logprobs(found: Any, top: int) -> tuple[TokenLogprob, ...] | None:
    """Each token with its `top` most likely ones, from either API's form; None where there is none.

    llama.cpp answers /completions in the chat form too. Alternatives of probability 0 are left out.
    Raises FaultError for a value that is no ln p, and for a drawn token of probability 0.
    """
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("content"), list):
        return tuple(
            TokenLogprob(
                _encodable(item["token"]),
                _drawn(item["logprob"]),
                _best([(t["token"], t["logprob"]) for t in item.get("top_logprobs") or []], top),
            )
            for item in found["content"]
        )
    if not isinstance(found.get("tokens"), list):
        return None
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    return tuple(
        TokenLogprob(_encodable(token), _drawn(logprob), _best(list((others or {}).items()), top))
        for token, logprob, others in zip(
            found["tokens"], found["token_logprobs"], tops, strict=True
        )
    )


def _best(pairs: Sequence[tuple[Any, Any]], top: int) -> tuple[tuple[str, float], ...]:
    found = [(_encodable(token), _logprob(value)) for token, value in pairs]
    possible = [pair for pair in found if pair[1] > -math.inf]
    return tuple(sorted(possible, key=lambda pair: -pair[1])[:top])


def _drawn(value: Any) -> float:
    logprob = _logprob(value)
    if logprob == -math.inf:
        raise FaultError("its replies hold a token of probability 0", lasting=True)
    return logprob


def _logprob(value: Any) -> float:
    try:
        logprob = float(value)
    except OverflowError:  # JSON has whole numbers of any size
        logprob = math.nan
    if math.isnan(logprob) or logprob == math.inf:
        raise FaultError("its replies hold a log-probability that is none", lasting=True)
    return logprob


def candidates_of(prompt: EncodedPrompt, replies: Sequence[Reply], lost: Cost) -> Candidates:
    """Replies to one prompt as a group; of tokens only their number is known, so each is −1.

    `lost` is what the draw cost besides them.
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
