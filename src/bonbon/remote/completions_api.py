"""OpenAI's completions API as servers speak it: what is asked for, and what the replies mean.

Pure functions that the sampler and the upstream of `bonbon serve` share; `bonbon.remote.client`
sends and receives. Those that read raise FaultError for a reply that is no use, and LookupError,
TypeError, ValueError or AttributeError for what is no reply at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeGuard

from bonbon.config.sampling import SamplingConfig
from bonbon.remote.client import FaultError
from bonbon.remote.endpoints import message_text

# What servers add to a request that leaves it out (a model's recommended settings, or their own),
# turned off: the sampling settings are the whole of the distribution. By `owned_by` of /models.
_OFF: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vllm": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
        "bonbon": {"top_k": 0, "best_of": 1},  # which would choose by its own reward as well
    }
)
SEEDS = 2**31  # every server takes these
_MOST_TOKENS = 2**24  # of a prompt or a completion; beyond the longest context there is


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What a server has.

    Its models' names, the settings that keep its own ones out, what kind of server it says it is
    (`owned_by`), and the longest prompt and completion together, in tokens, by model.
    """

    models: tuple[str, ...]
    off: Mapping[str, Any]
    owner: str = ""
    contexts: Mapping[str, int] = field(default_factory=dict)


def read_offer(found: Any) -> Offer:
    """An offer from the reply of /models; one without models is none."""
    models = found["data"]
    owner = str(models[0].get("owned_by"))
    contexts = {str(model["id"]): model.get("max_model_len") for model in models}
    known = {name: length for name, length in contexts.items() if is_count(length)}
    return Offer(tuple(contexts), _OFF.get(owner, {}), owner, known)


def distribution(sampling: SamplingConfig) -> dict[str, Any]:
    """The fields that say which distribution tokens are drawn from."""
    if sampling.top_k == 1:  # the most likely token; top_k is not in OpenAI's API
        return {"temperature": 0.0, "top_p": 1.0}
    cut = {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, **cut}


# --- replies --------------------------------------------------------------------------------------


def text_of(choice: Any) -> str:
    """A choice's text, of either API; a reasoning model's thoughts are no part of it.

    A lone surrogate, which no encoding can hold, becomes a question mark.
    """
    if "message" in choice:
        return encodable(message_text(choice["message"].get("content")))
    if not isinstance(choice["text"], str):
        raise TypeError("text")
    return encodable(choice["text"])


def encodable(text: Any) -> str:
    """A text with question marks for lone surrogates."""
    return str(text).encode(errors="replace").decode()


def finish_reason(choice: Any) -> str:
    """`stop` or `length`. Raises FaultError for any other end, as that is no draw of the model."""
    found = choice.get("finish_reason")
    if found in ("stop", "length"):
        return str(found)
    # Another try might bring one after "abort", but would get around a filter.
    lasting = found in ("content_filter", "tool_calls", "function_call")
    raise FaultError(f"a candidate ended with finish_reason {found!r:.40}", lasting=lasting)


@dataclass(frozen=True)
class Usage:
    """Tokens of a reply. `prefilled` are the prompt's that were not found in the server's cache."""

    tokens: int
    prompt_tokens: int
    prefilled: int


def read_usage(found: Any) -> Usage | None:
    """What a reply took; None where it does not say, or nothing that can be. Raises nothing."""
    usage = _field(found, "usage")
    tokens, prompt_tokens = _field(usage, "completion_tokens"), _field(usage, "prompt_tokens")
    if not is_count(tokens) or not is_count(prompt_tokens):
        return None
    cached = _field(_field(usage, "prompt_tokens_details"), "cached_tokens")
    prefilled = max(0, prompt_tokens - (cached if is_count(cached) else 0))
    return Usage(tokens, prompt_tokens, prefilled)


def plausible_usage(found: Any) -> Usage:
    """What a reply took. Raises FaultError where it does not say."""
    usage = read_usage(found)
    if usage is None:
        raise FaultError("its replies do not say how many tokens they took (`usage`)", lasting=True)
    return usage


def _field(found: Any, name: str) -> Any:
    return found.get(name) if isinstance(found, dict) else None


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value can be a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS


def logprob_items(found: Any) -> Iterator[tuple[Any, Any, list[tuple[Any, Any]]]] | None:
    """(token, ln p, most likely tokens with theirs) of each token, from either API's form.

    llama.cpp answers /completions in the chat form too. None where there is neither; nothing of it
    is checked yet.
    """
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("content"), list):
        return (
            (
                item["token"],
                item["logprob"],
                [(other["token"], other["logprob"]) for other in item.get("top_logprobs") or []],
            )
            for item in found["content"]
        )
    if not isinstance(found.get("tokens"), list):
        return None
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    return (
        (token, logprob, list((others or {}).items()))
        for token, logprob, others in zip(
            found["tokens"], found["token_logprobs"], tops, strict=True
        )
    )


def read_logprob(value: Any) -> float:
    """ln p (nats), perhaps −∞. Raises FaultError for a value that is none."""
    try:
        logprob = float(value)
    except OverflowError:  # JSON has whole numbers of any size
        logprob = math.nan
    if math.isnan(logprob) or logprob == math.inf:
        raise FaultError("its replies hold a log-probability that is none", lasting=True)
    return logprob


def drawn_logprob(value: Any) -> float:
    """ln p of a drawn token (nats). Raises FaultError for a value that is none, and for −∞."""
    logprob = read_logprob(value)
    if logprob == -math.inf:
        raise FaultError("its replies hold a token of probability 0", lasting=True)
    return logprob
