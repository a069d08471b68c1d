"""Conversion of answers to OpenAI's objects."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from bonbon.decoding.catalogue import describe_strategy
from bonbon.sampling.cost import Cost
from bonbon.serve.api.schemas import (
    AssistantMessage,
    CandidateObject,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatToken,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CostObject,
    Details,
    FinishReason,
    TopLogprob,
    UsageObject,
)
from bonbon.serve.backend import Answer, AnswerJob, Choice, TokenLogprob

_UNLIKELY = -9999.0  # OpenAI's value for −∞, which JSON cannot hold


# --- both routes ----------------------------------------------------------------------------------


def usage_of(answers: Sequence[Answer]) -> UsageObject:
    """Return the token usage of a request, summed over its prompts."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    drawn = sum(answer.cost.generated for answer in answers)
    return UsageObject(prompt_tokens=prompt, completion_tokens=drawn, total_tokens=prompt + drawn)


def indexed(job: AnswerJob, answers: Sequence[Answer]) -> list[tuple[int, Choice]]:
    """Return the choices of all prompts with OpenAI's indices."""
    return [
        (prompt * job.choices + place, choice)
        for prompt, answer in enumerate(answers)
        for place, choice in enumerate(answer.choices)
    ]


def _envelope(
    request_id: str, job: AnswerJob, answers: Sequence[Answer], candidates: bool
) -> dict[str, Any]:
    """Return the fields of a reply other than the choices."""
    return {
        "id": request_id,
        "created": int(time.time()),
        "model": job.model,
        "usage": usage_of(answers),
        "bonbon": details_of(job, answers, candidates),
    }


def details_of(job: AnswerJob, answers: Sequence[Answer], candidates: bool) -> Details:
    """Return how the choices of a request were made, with its candidates if asked for."""
    cost = sum((answer.cost for answer in answers), Cost())
    return Details(
        strategy=describe_strategy(job.strategy),
        rewards=[_number(choice.reward) for _, choice in indexed(job, answers)],
        drawn=sum(answer.generation.group.n for answer in answers),
        failed=sum(answer.failed for answer in answers),
        cost=CostObject(
            generated=cost.generated,
            prefilled=cost.prefilled,
            reward_calls=cost.reward_calls,
            seconds=cost.seconds,
        ),
        candidates=_candidates(job, answers) if candidates else None,
    )


def _candidates(job: AnswerJob, answers: Sequence[Answer]) -> list[CandidateObject]:
    objects = []
    for prompt, answer in enumerate(answers):
        group = answer.generation.group
        places = {choice.index: place for place, choice in enumerate(answer.choices)}
        rewards = group.rewards or (None,) * group.n
        for index, length in enumerate(group.lengths()):
            place = places.get(index)
            objects.append(
                CandidateObject(
                    prompt=prompt,
                    text=group.completions[index],
                    finish_reason=group.finish_reasons[index],
                    tokens=length,
                    reward=_number(rewards[index]),
                    choice=None if place is None else prompt * job.choices + place,
                )
            )
    return objects


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- chats ----------------------------------------------------------------------------------------


def chat_completion(
    request_id: str, job: AnswerJob, answers: Sequence[Answer], candidates: bool
) -> dict[str, Any]:
    """Return the reply to a chat."""
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage(content=choice.text),
            logprobs=_chat_logprobs(choice.logprobs),
            finish_reason=_reason(choice),
        )
        for index, choice in indexed(job, answers)
    ]
    return ChatCompletion(
        choices=choices, **_envelope(request_id, job, answers, candidates)
    ).model_dump()


def _chat_logprobs(logprobs: tuple[TokenLogprob, ...] | None) -> ChatLogprobs | None:
    if logprobs is None:
        return None
    content = [
        ChatToken(
            token=token.token,
            logprob=_logprob(token.logprob),
            bytes=_bytes(token.token),
            top_logprobs=[
                TopLogprob(token=text, logprob=_logprob(value), bytes=_bytes(text))
                for text, value in token.top
            ],
        )
        for token in logprobs
    ]
    return ChatLogprobs(content=content)


def _logprob(value: float) -> float:
    return value if math.isfinite(value) else _UNLIKELY


def _bytes(token: str) -> list[int] | None:
    """Return a token's bytes; None for a part of a character, whose bytes are not known."""
    return None if "\ufffd" in token else list(token.encode(errors="replace"))


def _reason(choice: Choice) -> FinishReason:
    return "length" if choice.finish_reason == "length" else "stop"


# --- completions ----------------------------------------------------------------------------------


def completion(
    request_id: str, job: AnswerJob, answers: Sequence[Answer], candidates: bool
) -> dict[str, Any]:
    """Return the reply to one or more prompts; `job` is the first prompt's."""
    choices = [
        CompletionChoice(
            index=index,
            text=choice.text,
            logprobs=_completion_logprobs(choice.logprobs, job.logprobs),
            finish_reason=_reason(choice),
        )
        for index, choice in indexed(job, answers)
    ]
    return Completion(
        choices=choices, **_envelope(request_id, job, answers, candidates)
    ).model_dump()


def _completion_logprobs(
    logprobs: tuple[TokenLogprob, ...] | None, top: int | None
) -> CompletionLogprobs | None:
    if logprobs is None:
        return None
    tokens = [token.token for token in logprobs]
    offsets = [0]
    for text in tokens[:-1]:
        offsets.append(offsets[-1] + len(text))
    tops = [{text: _logprob(value) for text, value in token.top} for token in logprobs]
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_logprob(token.logprob) for token in logprobs],
        top_logprobs=tops if top else None,
        text_offset=offsets[: len(tokens)],
    )
