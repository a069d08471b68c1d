"""OpenAI's completions API as servers implement it: fields of requests, parsing of replies.

Pure functions that the sampler and the upstream of `bonbon serve` share; `bonbon.remote.client`
sends and receives. Functions that parse raise FaultError for an unusable reply, and LookupError,
TypeError, ValueError or AttributeError for a malformed one.
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

# Servers add settings that a request leaves out (a model's recommended ones, or their own). These
# turn them off, so that our sampling settings alone define the distribution. By `owned_by` of
# /models.
_OFF: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vllm": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
        "bonbon": {"top_k": 0, "best_of": 1},  # else it would also select by its own reward
    }
)
SEEDS = 2**31  # every server takes these
_MOST_TOKENS = 2**24  # of a prompt or a completion; no model has so long a context


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """The models and properties that a server reports.

    `off` holds the settings that turn the server's own defaults off, `owner` is the kind of server
    (`owned_by`), `contexts` the longest prompt and completion together, in tokens, by model.
    """

    models: tuple[str, ...]
    off: Mapping[str, Any]
    owner: str = ""
    contexts: Mapping[str, int] = field(default_factory=dict)


def read_offer(reply: Any) -> Offer:
    """Parse the reply of /models; it must list a model."""
    models = reply["data"]
    owner = str(models[0].get("owned_by"))
    contexts = {str(model["id"]): model.get("max_model_len") for model in models}
    known = {name: length for name, length in contexts.items() if is_count(length)}
    return Offer(tuple(contexts), _OFF.get(owner, {}), owner, known)


def distribution(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the request fields that set the distribution of tokens."""
    if sampling.top_k == 1:  # the most likely token; top_k is not in OpenAI's API
        return {"temperature": 0.0, "top_p": 1.0}
    cut = {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, **cut}


# --- replies --------------------------------------------------------------------------------------


def text_of(choice: Any) -> str:
    """Return a choice's text, of either API, without a reasoning model's thoughts.

    A lone surrogate, which no encoding can hold, becomes a question mark.
    """
    if "message" in choice:
        return encodable(message_text(choice["message"].get("content")))
    if not isinstance(choice["text"], str):
        raise TypeError("text")
    return encodable(choice["text"])


def encodable(text: Any) -> str:
    """Replace lone surrogates by question marks."""
    return str(text).encode(errors="replace").decode()


def finish_reason(choice: Any) -> str:
    """Return `stop` or `length`. Raises FaultError for other reasons: the text is no plain draw."""
    reason = choice.get("finish_reason")
    if reason in ("stop", "length"):
        return str(reason)
    # After "abort" another try may succeed; after a filter it would bias the draws.
    lasting = reason in ("content_filter", "tool_calls", "function_call")
    raise FaultError(f"a candidate ended with finish_reason {reason!r:.40}", lasting=lasting)


@dataclass(frozen=True)
class TokenUsage:
    """The token counts of a reply. `prefilled` counts the prompt's tokens that were not cached."""

    tokens: int
    prompt_tokens: int
    prefilled: int


def read_usage(reply: Any) -> TokenUsage | None:
    """Parse a reply's token counts; None where they are missing or impossible. Never raises."""
    usage = _field(reply, "usage")
    tokens, prompt_tokens = _field(usage, "completion_tokens"), _field(usage, "prompt_tokens")
    if not is_count(tokens) or not is_count(prompt_tokens):
        return None
    cached = _field(_field(usage, "prompt_tokens_details"), "cached_tokens")
    prefilled = max(0, prompt_tokens - (cached if is_count(cached) else 0))
    return TokenUsage(tokens, prompt_tokens, prefilled)


def plausible_usage(reply: Any) -> TokenUsage:
    """Parse a reply's token counts. Raises FaultError where there are none."""
    usage = read_usage(reply)
    if usage is None:
        raise FaultError("its replies do not say how many tokens they took (`usage`)", lasting=True)
    return usage


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value can be a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS


def logprob_items(logprobs: Any) -> Iterator[tuple[Any, Any, list[tuple[Any, Any]]]] | None:
    """Yield (token, ln p, most likely tokens with their ln p) for each token, of either API.

    llama.cpp answers /completions in the chat form too. None where neither form is there. The
    values are not checked.
    """
    if not isinstance(logprobs, dict):
        return None
    if isinstance(logprobs.get("content"), list):
        return (
            (
                item["token"],
                item["logprob"],
                [(other["token"], other["logprob"]) for other in item.get("top_logprobs") or []],
            )
            for item in logprobs["content"]
        )
    if not isinstance(logprobs.get("tokens"), list):
        return None
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return (
        (token, logprob, list((others or {}).items()))
        for token, logprob, others in zip(
            logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True
        )
    )


def read_logprob(value: Any) -> float:
    """Parse ln p (nats), which may be −∞. Raises FaultError for an invalid value."""
    try:
        logprob = float(value)
    except OverflowError:  # JSON allows integers of any size
        logprob = math.nan
    if math.isnan(logprob) or logprob == math.inf:
        raise FaultError("its replies hold an invalid log-probability", lasting=True)
    return logprob


def drawn_logprob(value: Any) -> float:
    """Parse ln p of a drawn token (nats). Raises FaultError for an invalid value, and for −∞."""
    logprob = read_logprob(value)
    if logprob == -math.inf:
        raise FaultError("its replies hold a token of probability 0", lasting=True)
    return logprob
