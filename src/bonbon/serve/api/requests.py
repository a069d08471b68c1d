"""Request bodies: OpenAI's fields, and BoNBoN's own.

Types are strict: "5" is not a number. An unsupported field that would change the answer is an error
that names it, unless the backend passes it on; a field that changes nothing is dropped. An explicit
null is the same as leaving a field out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bonbon.serve.answers import bad_request
from bonbon.serve.api.errors import invalid_fields

# Accepted and ignored: they do not change an answer.
IGNORED = frozenset(
    {
        "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user",
    }
)  # fmt: skip

# Accepted only with these values, which ask for nothing (null is always accepted).
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "audio": (),
        "echo": (False,),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "prediction": (),
        "presence_penalty": (0,),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }
)

_MOST_FIELDS = 100  # the error names each unknown one
_LARGEST_TOP_K = 2**31 - 1
_GREEDY = "below 0.00001: the most likely token, and as many candidates as choices"


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Fields):
    """A text part of a message's content; other kinds are not supported."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """A message of a chat. Tool calls cannot be given to the model."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = None
    tool_call_id: str | None = None
    # Clients send an assistant's message back with these.
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Fields):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="ignored")


class BonbonOptions(_Fields):
    """Options of BoNBoN's own."""

    return_candidates: bool | None = Field(
        None, description="answer with all candidates and their rewards"
    )


class GenerationRequest(_Fields):
    """The fields that both routes accept."""

    model: str | None = Field(None, description="null: the server's first")
    n: int | None = Field(None, ge=1, description="choices to return; null: 1")
    best_of: int | None = Field(
        None, ge=1, description="candidates to draw, at least n; null: the server's default"
    )
    strategy: str | dict[str, Any] | None = Field(
        None, description="how the best is chosen: a name, or {name: NAME, setting: value, …}"
    )
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description=_GREEDY)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_LARGEST_TOP_K, description="0: off")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = Field(None, description="send the choices in pieces, once chosen")
    stream_options: StreamOptions | None = None
    bonbon: BonbonOptions | None = None

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("`best_of` is less than `n`: choices are taken from the candidates")
        return self

    @property
    def choices(self) -> int:
        """The number of choices to return."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a completion."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def return_candidates(self) -> bool:
        """True if the answer shows all candidates."""
        return bool(self.bonbon and self.bonbon.return_candidates)


class ChatRequest(GenerationRequest):
    """A request for the next message of a chat."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, description="another name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs logprobs")

    @model_validator(mode="after")
    def _chat_fields_fit(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; send one of them")
        return self


class CompletionRequest(GenerationRequest):
    """A request for the continuation of one or more texts."""

    prompt: str | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    logprobs: int | None = Field(
        None, ge=0, le=5, description="likely tokens to list beside each; 0: the token alone"
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _no_token_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
            raise ValueError("token ids are not taken; send texts")
        return value


Kind = TypeVar("Kind", bound=GenerationRequest)


def parse_request(
    kind: type[Kind], values: Any, passthrough: frozenset[str]
) -> tuple[Kind, dict[str, Any]]:
    """Return a checked request, and the fields that are passed on.

    Raises BackendError naming the field that is unknown, wrong or unsupported.
    """
    if not isinstance(values, dict):
        raise bad_request("the body is not a JSON object", "invalid_value")
    strategy = values.get("strategy")
    if len(values) > _MOST_FIELDS or (isinstance(strategy, dict) and len(strategy) > _MOST_FIELDS):
        raise bad_request(f"more than {_MOST_FIELDS} fields", "invalid_value")
    passed = passthrough - kind.model_fields.keys()
    extra = {name: value for name, value in values.items() if name in passed and value is not None}
    _check_finite(extra)
    own = {name: value for name, value in values.items() if name not in passed}
    for name in NEUTRAL.keys() & own.keys():
        if not _is_neutral(name, own[name]):
            raise bad_request(
                f"this server cannot do what {name!r} asks for; leave it out",
                "unsupported_parameter",
                name,
            )
    dropped = IGNORED | NEUTRAL.keys()
    own = {name: _whole(value) for name, value in own.items() if name not in dropped}
    try:
        return kind.model_validate(own), extra
    except ValidationError as error:
        raise invalid_fields(error, own) from error


def _whole(value: Any) -> Any:
    """Return an integral float as an int: to JSON Schema and some clients, 2.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_neutral(name: str, value: Any) -> bool:
    if value is None:
        return True
    same_kind = [
        item for item in NEUTRAL[name] if isinstance(item, bool) == isinstance(value, bool)
    ]
    return value in same_kind


def _check_finite(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:  # 1e999 is JSON, and an infinity here
            raise bad_request("a number is too large", "invalid_value", name) from error
