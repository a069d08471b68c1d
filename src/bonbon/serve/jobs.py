"""Conversion of a request into jobs, one for each prompt."""

from __future__ import annotations

from typing import Any

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.catalogue import describe_strategy, parse_strategy
from bonbon.decoding.strategy import Strategy
from bonbon.groups.group import Prompt
from bonbon.serve.answers import bad_request
from bonbon.serve.api.requests import ChatRequest, CompletionRequest, GenerationRequest, Message
from bonbon.serve.backend import AnswerJob
from bonbon.serve.config import ServeConfig

# Below this a float32 softmax puts all mass on the most likely token, or overflows.
_COLDEST = 1e-5


def jobs_of(
    request: GenerationRequest,
    config: ServeConfig,
    *,
    request_id: str,
    model: str,
    deadline: float,
    extra: dict[str, Any],
) -> list[AnswerJob]:
    """Return a job for each of a request's prompts.

    Raises BackendError for more than the configuration allows, and for an unknown strategy.
    """
    prompts = prompts_of(request)
    sampling, strategy = sampling_of(request, config), _strategy(request, config)
    names = (
        [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
    )
    return [
        AnswerJob(
            request_id=name,
            model=model,
            prompt=prompt,
            sampling=sampling,
            strategy=strategy,
            choices=request.choices,
            deadline=deadline,
            stop=request.stops,
            logprobs=_logprobs(request),
            seeded=request.seed is not None,
            extra=extra,
        )
        for name, prompt in zip(names, prompts, strict=True)
    ]


def prompts_of(request: GenerationRequest) -> list[Prompt]:
    """Return the prompts of a request: one list of messages, or the texts to continue."""
    if isinstance(request, ChatRequest):
        return [[_message(message) for message in request.messages]]
    assert isinstance(request, CompletionRequest)
    return [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)


def sampling_of(request: GenerationRequest, config: ServeConfig) -> SamplingConfig:
    """Return the server's sampling settings, replaced by the request's where it sets them.

    At temperature 0 all candidates are equal, so only as many as choices are drawn.
    """
    n = request.best_of or max(config.sampling.n, request.choices)
    max_tokens = _max_tokens(request) or config.sampling.max_new_tokens
    if n > config.max_best_of:
        name = "best_of" if request.best_of else "n"
        raise bad_request(f"{name} is more than {config.max_best_of}", "invalid_value", name)
    if max_tokens > config.max_tokens:
        name = "max_tokens" if request.max_tokens else "max_completion_tokens"
        raise bad_request(f"{name} is more than {config.max_tokens}", "invalid_value", name)
    requested = {
        "n": n,
        "max_new_tokens": max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
    }
    update: dict[str, Any] = {name: value for name, value in requested.items() if value is not None}
    if request.temperature is not None and request.temperature < _COLDEST:
        update |= {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "n": request.choices}
    return config.sampling.model_copy(update=update)


def _max_tokens(request: GenerationRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return request.max_tokens or request.max_completion_tokens
    return request.max_tokens


def _strategy(request: GenerationRequest, config: ServeConfig) -> Strategy:
    """Return the request's strategy; settings it leaves out come from a server default of its kind.

    Requests may not change settings that name code or models to load: they could run any function
    of any module.
    """
    if request.strategy is None:
        return config.strategy
    named = request.strategy if isinstance(request.strategy, dict) else {"name": request.strategy}
    own = describe_strategy(config.strategy)
    if named.get("name") == own["name"]:
        named = own | named
    try:
        strategy = parse_strategy(named)
    except ValueError as error:
        raise bad_request(str(error), "invalid_value", "strategy") from error
    for name in sorted(strategy.loads & named.keys()):
        known = (own.get(name), type(strategy).model_fields[name].default)
        if named[name] not in known:
            raise bad_request(
                f"{name!r} names code or a model to load, which requests may not; start the server "
                "with it",
                "invalid_value",
                "strategy",
            )
    return strategy


def _logprobs(request: GenerationRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    assert isinstance(request, CompletionRequest)
    return request.logprobs


def _message(message: Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    fields = {"role": role, "content": message.text}
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return fields | {key: value for key, value in named.items() if value is not None}
