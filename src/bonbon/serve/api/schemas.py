"""Response bodies: OpenAI's objects with a further field `bonbon`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class UsageObject(BaseModel):
    """Token counts. Completion tokens include those of rejected candidates."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CostObject(BaseModel):
    """The cost of an answer; see `bonbon.sampling.cost.Cost`."""

    generated: int
    prefilled: int
    reward_calls: int
    seconds: float


class CandidateObject(BaseModel):
    """A drawn completion. `choice` is its index among the choices, if it was chosen."""

    prompt: int
    text: str
    finish_reason: str
    tokens: int
    reward: float | None
    choice: int | None


class Details(BaseModel):
    """A record of how the choices were made. `rewards` has one number a choice."""

    strategy: dict[str, Any]
    rewards: list[float | None]
    drawn: int
    failed: int
    cost: CostObject
    candidates: list[CandidateObject] | None


class TopLogprob(BaseModel):
    """A likely token, its ln p (nats) and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopLogprob):
    """A token of a message."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[ChatToken] | None
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """The tokens of a completion, and their offsets in the text (characters)."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class AssistantMessage(BaseModel):
    """A chosen message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """A choice of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionChoice(BaseModel):
    """A choice of a completion; those of the i-th prompt have the indices i·n, i·n + 1, …"""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The reply to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    bonbon: Details


class Completion(BaseModel):
    """The reply to one or more prompts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject
    bonbon: Details


class ModelObject(BaseModel):
    """A model's name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bonbon"


class ModelList(BaseModel):
    """The names that `model` may have."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(BaseModel):
    """The server's state."""

    status: Literal["ok", "unavailable", "stopping"]


class ErrorObject(BaseModel):
    """A description of an error; `param` names the wrong field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The reply to a request that failed."""

    error: ErrorObject
