"""Scoring completions by a reward model that vLLM serves.

Its three routes take and give, with `use_activation` off so that the numbers are the model's own
and not their sigmoid (vLLM 0.12 or later):

| `api` | asks | reads | the model |
|---|---|---|---|
| `pooling` | `POST /pooling` | `data[0].data`, a vector | any with one number a text |
| `classify` | `POST /classify` | `data[0].probs`, a vector | a classifier with one label |
| `score` | `POST /score` | `data[0].score` | a cross-encoder, or a classifier with one label |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from bonbon.config.reward import RewardServerConfig
from bonbon.groups.group import Message, Prompt, as_text
from bonbon.remote.blocking_client import RefusedRequestError, Request, Server
from bonbon.remote.client import FaultError

# A text that is too long loses tokens at its beginning.
_ASKED = {"use_activation": False, "truncate_prompt_tokens": -1, "truncation_side": "left"}
_VALUES: Mapping[str, str] = MappingProxyType(
    {"pooling": "data", "classify": "probs", "score": "score"}
)


class OpenAIReward:
    """A `Reward` behind one of vLLM's routes; one request a completion.

    Where the served model has a chat template, `pooling` and `classify` score the conversation with
    the completion as its last message, as `RewardModel` does. Otherwise they score the text of the
    prompt and the completion behind it, tokenised in one piece: where that merges tokens across the
    seam, or the tokenizer has a way of its own for pairs, the score differs from `RewardModel`'s,
    which encodes the two as a pair. `score` sends a pair, which vLLM encodes as one for
    cross-encoders and joins to one text for others; it never uses the tokenizer's chat template.
    With `encode` there is no difference: `pooling` and `classify` then get those token ids.
    A text that is too long loses its first tokens, a leading special one among them.

    Args:
        settings: the server and the route; `base_url` may end with `/v1`.
        encode: the token ids that the model reads for a prompt and a completion, such as
            `RewardModel.encode`; None: the server tokenises.

    Raises BonbonError when the address or the key cannot be used.
    """

    def __init__(
        self,
        settings: RewardServerConfig,
        encode: Callable[[Prompt, str], Sequence[int]] | None = None,
    ) -> None:
        self.settings = settings
        self._encode = encode
        root = settings.base_url.rstrip("/").removesuffix("/v1")  # where the routes are
        self._server = Server(settings.model_copy(update={"base_url": root}), "reward.server")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """See `Reward`.

        Raises BonbonError, naming the completion and the reason, where the server does not give one
        finite number for it.
        """
        pairs = list(zip(prompts, completions, strict=True))
        requests = [
            self._request(
                f"the reward of completion {index + 1} of {len(pairs)} ({completion!r:.60})",
                self._asked(prompt, completion),
            )
            for index, (prompt, completion) in enumerate(pairs)
        ]
        return np.array(self._server.ask_all(requests), dtype=np.float64)

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _asked(self, prompt: Prompt, completion: str) -> dict[str, Any]:
        if self.settings.api == "score":
            return {"text_1": as_text(prompt), "text_2": completion}
        if self._encode is not None:
            return {"input": list(self._encode(prompt, completion))}
        if self._has_template:
            return {"messages": _conversation(prompt, completion)}
        return {"input": as_text(prompt) + completion}

    @cached_property
    def _has_template(self) -> bool:
        """Whether the served model takes conversations, by asking for the score of one."""
        asked = {"messages": _conversation("Hello", "Hello")}
        try:
            self._server.ask_all([self._request("the reward of a first conversation", asked)])
        except RefusedRequestError as refusal:
            if refusal.about_request:
                return False
            raise
        return True

    def _request(self, name: str, asked: dict[str, Any]) -> Request[float]:
        named = {} if self.settings.model is None else {"model": self.settings.model}
        return Request(name, self.settings.api, {**_ASKED, **named, **asked}, self._read)

    def _read(self, found: Any) -> float:
        items = found["data"]
        if len(items) != 1:
            raise FaultError(f"{len(items)} results for one completion", lasting=True)
        return _number(items[0][_VALUES[self.settings.api]])


def _conversation(prompt: Prompt, completion: str) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*messages, {"role": "assistant", "content": completion}]


def _number(value: Any) -> float:
    """The only number in what may be a vector, or a vector a token; FaultError for anything else"""
    shape: list[int] = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(value) != 1:
            raise FaultError(
                f"a result of shape {tuple(shape)} or more; a reward model gives one number, and "
                "vLLM one a text with --pooler-config.task classify",
                lasting=True,
            )
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FaultError(f"{value!r:.40} is no number", lasting=True)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FaultError(f"it is {number}; a reward must be finite", lasting=True)
    return number
