"""What goes out: OpenAI's objects, with `bonbon` beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class UsageObject(BaseModel):
    """Tokens. Completion tokens are all that were drawn, those of rejected candidates included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CostObject(BaseModel):
    """What the answer cost; see `bonbon.sampling.cost.Cost`."""

    generated: int
    prefilled: int
    reward_calls: int
    seconds: float


class CandidateObject(BaseModel):
    """A drawn completion. `choice` is the index of the choice that it became, if any."""

    prompt: int
    text: str
    finish_reason: str
    tokens: int
    reward: float | None
    choice: int | None


class Details(BaseModel):
    """How the choices came about. `rewards` has one number a choice."""

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
    """The tokens of a completion, and where in the text they begin (characters)."""

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
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    bonbon: Details


class Completion(BaseModel):
    """The answer to one or more prompts."""

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
    """Whether a request has a chance now."""

    status: Literal["ok", "unavailable", "stopping"]


class ErrorObject(BaseModel):
    """What is wrong; `param` is the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """An error."""

    error: ErrorObject
