"""Rewards from a reward model that vLLM serves (0.12 or later).

It has three routes. Requests turn `use_activation` off, so that the numbers are the model's outputs
and not their sigmoid:

| `api` | request | value of the reply | the model |
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
_FIELDS = {"use_activation": False, "truncate_prompt_tokens": -1, "truncation_side": "left"}
_VALUES: Mapping[str, str] = MappingProxyType(
    {"pooling": "data", "classify": "probs", "score": "score"}
)


class OpenAIReward:
    """A `Reward` that asks one of vLLM's routes, one request a completion.

    Where the served model has a chat template, `pooling` and `classify` score the conversation with
    the completion as its last message, as `RewardModel` does. Otherwise they score prompt and
    completion as one text. `RewardModel` encodes the two as a pair instead, so its score differs
    where tokens merge across the boundary or the tokenizer treats pairs specially. `score` sends a
    pair, which vLLM encodes as a pair for cross-encoders and joins to one text for other models; it
    never uses the tokenizer's chat template. With `encode` there is no difference: `pooling` and
    `classify` then get those token ids. A text that is too long loses its first tokens, a leading
    special token included.

    Args:
        settings: the server and the route; `base_url` may end with `/v1`.
        encode: maps a prompt and a completion to the model's token ids, such as
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
        root = settings.base_url.rstrip("/").removesuffix("/v1")  # the routes are not under /v1
        self._server = Server(settings.model_copy(update={"base_url": root}), "reward.server")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """Score completions; see `Reward`.

        Raises BonbonError, naming the completion and the reason, where the server does not return
        one finite number for it.
        """
        pairs = list(zip(prompts, completions, strict=True))
        requests = [
            self._request(
                f"the reward of completion {index + 1} of {len(pairs)} ({completion!r:.60})",
                self._body(prompt, completion),
            )
            for index, (prompt, completion) in enumerate(pairs)
        ]
        return np.array(self._server.ask_all(requests), dtype=np.float64)

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _body(self, prompt: Prompt, completion: str) -> dict[str, Any]:
        if self.settings.api == "score":
            return {"text_1": as_text(prompt), "text_2": completion}
        if self._encode is not None:
            return {"input": list(self._encode(prompt, completion))}
        if self._has_template:
            return {"messages": _conversation(prompt, completion)}
        return {"input": as_text(prompt) + completion}

    @cached_property
    def _has_template(self) -> bool:
        """True if the served model accepts conversations; one request tests it."""
        body = {"messages": _conversation("Hello", "Hello")}
        try:
            self._server.ask_all([self._request("the reward of a first conversation", body)])
        except RefusedRequestError as refusal:
            if refusal.about_request:
                return False
            raise
        return True

    def _request(self, name: str, body: dict[str, Any]) -> Request[float]:
        named = {} if self.settings.model is None else {"model": self.settings.model}
        return Request(name, self.settings.api, {**_FIELDS, **named, **body}, self._read)

    def _read(self, reply: Any) -> float:
        items = reply["data"]
        if len(items) != 1:
            raise FaultError(f"{len(items)} results for one completion", lasting=True)
        return _number(items[0][_VALUES[self.settings.api]])


def _conversation(prompt: Prompt, completion: str) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*messages, {"role": "assistant", "content": completion}]


def _number(value: Any) -> float:
    """Return the one number of a scalar or of nested lists. Raises FaultError otherwise."""
    shape: list[int] = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(value) != 1:
            raise FaultError(
                f"a result of shape {tuple(shape)} or more; a reward model gives one number, and "
                "vLLM gives one a text with --pooler-config.task classify",
                lasting=True,
            )
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FaultError(f"{value!r:.40} is not a number", lasting=True)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FaultError(f"it is {number}; a reward must be finite", lasting=True)
    return number
