"""A sampler that draws completions from a server: vLLM, SGLang, llama.cpp, or a hosted one.

vLLM, SGLang and llama.cpp get the prompt's token ids, so that the prompt is the same as in
training; other servers get the text, or the messages. vLLM and SGLang (since July 2026) return the
drawn token ids; otherwise the text is tokenised again, which may give other tokens than were drawn.

Every draw has its own seed, the same at every try: its prompt's seed plus its number
(`random_streams.request_seed`). vLLM seeds the i-th draw of a request with seed + i, so one request
asks for several draws; how draws are grouped into requests does not change them. Other servers get
one draw a request, as they do not document the seeds of more. vLLM and llama.cpp are deterministic
for a seed, SGLang is with --enable-deterministic-inference, hosted servers as they document. No
server gives the same draws as `bonbon.sampling.generation_loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import OpenAISamplerConfig, SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.remote.blocking_client import Request, Server
from bonbon.remote.client import FaultError
from bonbon.remote.completions_api import (
    SEEDS,
    distribution,
    drawn_logprob,
    finish_reason,
    is_count,
    logprob_items,
    plausible_usage,
    text_of,
)
from bonbon.sampling.completion_text import completion_text
from bonbon.sampling.encoding import encode_prompts, prompts_for
from bonbon.sampling.random_streams import request_seed
from bonbon.system.errors import BonbonError

_TAKE_IDS = frozenset({"vllm", "sglang", "llamacpp"})  # llama.cpp: since August 2025
# Draws a request, where the i-th has the seed + i. A failed request loses all of its draws.
_TOGETHER: Mapping[str, int] = MappingProxyType({"vllm": 8})
_LARGE_SEEDS = frozenset({"vllm"})  # takes any below 2^63
_LARGEST_LOGPROB = 1e-3  # nats; 0 but for rounding


@dataclass(frozen=True)
class Terms:
    """The settings of requests to a server.

    The model's name, the kind of server (`owner`), the fields of every request, the longest prompt
    and completion together in tokens, whether the server takes and returns token ids, and the most
    draws a request (`together`).
    """

    model: str
    owner: str
    fields: dict[str, Any]
    context: int | None
    takes_ids: bool
    gives_ids: bool
    together: int


@dataclass(frozen=True)
class Draw:
    """A completion. `logprob` is ln p of its tokens, summed (nats), or NaN."""

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    finish_reason: str


class OpenAISampler:
    """A `Sampler` of an OpenAI-compatible server.

    The server's log-probabilities are kept only if they are those of the drawn tokens under the
    sampling settings: the server returned token ids, and the temperature is 1 without top-k and
    top-p. Otherwise they are NaN, to be computed by a forward pass.

    Args:
        processing_class: the policy's tokenizer, which must be the server's.
        config: what to draw.
        settings: the server.
        stream: names the random stream; see `TransformersSampler`.
        context: the most tokens of a prompt and its completion; None: the server's.

    Raises BonbonError when the address or the key cannot be used.
    """

    def __init__(
        self,
        processing_class: Tokenizer,
        config: SamplingConfig,
        settings: OpenAISamplerConfig,
        stream: str = "",
        context: int | None = None,
    ) -> None:
        self.tokenizer = processing_class
        self.config = config
        self.settings = settings
        self.stream = stream
        self.context = context
        self._server = Server(settings, "sampler")

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """See `Sampler.encode`; the context is the shorter of the policy's and the server's."""
        known = [length for length in (self.context, self.terms.context) if length is not None]
        return list(prompts_for(rows, self.tokenizer, min(known, default=None), self.config))

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """Draw n completions of each prompt; see `Sampler.sample`.

        Raises BonbonError, naming a prompt and the reason, when one of its draws was filtered,
        refused, or timed out. No group is ever smaller than n.
        """
        n, together = self.config.n, self.terms.together
        parts = [range(n)[start : start + together] for start in range(0, n, together)]
        requests = [self._request(prompt, ks) for prompt in prompts for ks in parts]

        def note(draws: Sequence[Draw]) -> None:
            if progress is not None:
                progress(sum(len(draw.token_ids) for draw in draws))

        answers = iter(self._server.ask_all(requests, note))
        return [_group(p, [draw for _ in parts for draw in next(answers)]) for p in prompts]

    def described(self) -> dict[str, Any]:
        """Describe the sampler for the provenance; see `Sampler.described`.

        `token_ids` are `drawn`, or `retokenised` from the text, with log-probabilities to be
        computed.
        """
        terms = self.terms
        return {
            "sampler": "openai",
            "server": terms.owner,
            "server_model": terms.model,
            "prompts_sent": "token_ids" if terms.takes_ids else "text",
            "token_ids": "drawn" if terms.gives_ids else "retokenised",
            "logprobs": "server" if self._keeps_logprobs else "none",
        }

    def close(self) -> None:
        """Cancel running requests and close the connections."""
        self._server.close()

    # --- properties of the server -----------------------------------------------------------------

    @cached_property
    def terms(self) -> Terms:
        """The settings of requests; the server is asked once. Raises BonbonError if that fails."""
        offer = self._server.offer()
        model = self.settings.model or _only(offer.models, self.settings.base_url)
        takes_ids = offer.owner in _TAKE_IDS
        gives_ids = takes_ids and self._gives_ids(model)
        greedy = self.config.top_k == 1  # vLLM refuses n > 1 for greedy draws
        return Terms(
            model=model,
            owner=offer.owner,
            fields={**offer.off, "model": model, "stream": False},
            context=offer.contexts.get(model),
            takes_ids=takes_ids,
            gives_ids=gives_ids,
            together=_TOGETHER.get(offer.owner, 1) if gives_ids and not greedy else 1,
        )

    def _gives_ids(self, model: str) -> bool:
        """Draw one token to see whether token ids are returned; older servers do not say."""
        tokenizer = self.tokenizer
        ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None]
        body = {"model": model, "prompt": ids[:1], "max_tokens": 1, "return_token_ids": True}

        def read(reply: Any) -> bool:
            return isinstance(reply["choices"][0].get("token_ids"), list)

        return self._server.ask_all([Request("a first token", "completions", body, read)])[0]

    @property
    def _keeps_logprobs(self) -> bool:
        own = self.config.temperature == 1 and not self.config.truncates
        return self.terms.gives_ids and own

    # --- requests ---------------------------------------------------------------------------------

    def _request(self, prompt: EncodedPrompt, ks: range) -> Request[list[Draw]]:
        """Build the request for draws `ks` of a prompt."""
        terms = self.terms
        seeds = 2**63 if terms.owner in _LARGE_SEEDS else SEEDS
        seed = (request_seed(self.config.seed, self.stream, prompt.prompt_id) + ks[0]) % seeds
        body = {**terms.fields, "n": len(ks), "seed": seed}
        body |= {"max_tokens": self.config.max_new_tokens, **distribution(self.config)}
        path = "completions"
        if terms.takes_ids:
            body["prompt"] = list(prompt.token_ids)
            body |= {"return_token_ids": True} if terms.gives_ids else {}
            body |= {"logprobs": 1} if self._keeps_logprobs else {}
        elif isinstance(prompt.prompt, str):
            body["prompt"] = self._sent_text(prompt, prompt.prompt)
        else:
            path, body["messages"] = "chat/completions", prompt.prompt
        numbers = f"{ks[0] + 1}" if len(ks) == 1 else f"{ks[0] + 1} to {ks[-1] + 1}"
        name = f"draw {numbers} of prompt {prompt.prompt_id}"
        return Request(name, path, body, partial(self._read, prompt, len(ks)))

    def _sent_text(self, prompt: EncodedPrompt, text: str) -> str:
        """Return the prompt's text; of a prompt cut to fit, the text of its remaining tokens."""
        if self._encoded(text) == prompt.token_ids:
            return text
        return str(self.tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True))

    def _encoded(self, text: str) -> tuple[int, ...]:
        (encoded,) = encode_prompts([PromptRow("", text)], self.tokenizer, max_tokens=None)
        return encoded.token_ids

    # --- replies ----------------------------------------------------------------------------------

    def _read(self, prompt: EncodedPrompt, count: int, reply: Any) -> list[Draw]:
        choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
        if len(choices) != count:
            raise FaultError(f"{len(choices)} completions of {count}", lasting=bool(choices))
        usage = plausible_usage(reply)
        if self.terms.takes_ids and usage.prompt_tokens != len(prompt.token_ids):
            raise FaultError(
                f"the server read {usage.prompt_tokens} tokens of a prompt of "
                f"{len(prompt.token_ids)}",
                lasting=True,
            )
        if not self.terms.gives_ids:  # one draw was asked for, so the usage is that draw's
            (choice,) = choices
            reason = self._reason(choice, usage.tokens)
            return [self._retokenised(prompt, text_of(choice), reason)]
        draws = [self._drawn(prompt, choice) for choice in choices]
        tokens = sum(len(draw.token_ids) for draw in draws)
        if tokens != usage.tokens:
            raise FaultError(f"{usage.tokens} tokens came with {tokens} token ids", lasting=True)
        return draws

    def _reason(self, choice: Any, tokens: int) -> str:
        reason, longest = finish_reason(choice), self.config.max_new_tokens
        if reason == "length" and tokens < longest:
            raise FaultError(
                f"the server ended a completion at {tokens} tokens, by its own limit below "
                f"max_new_tokens = {longest}",
                lasting=True,
            )
        return reason

    def _drawn(self, prompt: EncodedPrompt, choice: Any) -> Draw:
        """Make a draw from returned token ids, which include the end token."""
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids or not all(map(is_count, ids)):
            raise FaultError("its replies no longer have token ids", lasting=True)
        reason = self._reason(choice, len(ids))
        text = completion_text(self.tokenizer, prompt.token_ids, ids)
        if not _letters(text).startswith(_letters(text_of(choice))):
            raise FaultError(
                "the server's tokenizer is not the model's: the same tokens give another text",
                lasting=True,
            )
        logprob = _logprob(choice, len(ids)) if self._keeps_logprobs else math.nan
        return Draw(text, tuple(ids), logprob, reason)

    def _retokenised(self, prompt: EncodedPrompt, text: str, reason: str) -> Draw:
        """Make a draw by tokenising its text after the prompt."""
        ids: tuple[int, ...] | None = None
        if isinstance(prompt.prompt, str):
            whole = self._encoded(prompt.prompt + text)
            if whole[: len(prompt.token_ids)] == prompt.token_ids:
                ids = whole[len(prompt.token_ids) :]
        if ids is None:  # a token spans the boundary, or a template closes the prompt
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if reason == "stop" and end is not None and ids[-1:] != (end,):
            ids += (end,)
        if not ids:
            raise FaultError("a completion has no text", lasting=True)
        return Draw(text, ids, math.nan, reason)


def server_context(settings: OpenAISamplerConfig) -> int | None:
    """Ask a server for its context length in tokens; None if it does not report one.

    Raises BonbonError when the request fails, or when it has several models and none is named.
    """
    server = Server(settings, "sampler")
    try:
        offer = server.offer()
    finally:
        server.close()
    return offer.contexts.get(settings.model or _only(offer.models, settings.base_url))


def _only(models: Sequence[str], base_url: str) -> str:
    if len(models) > 1:
        raise BonbonError(
            f"the server at {base_url} has several models; set sampler.model to one of "
            f"{', '.join(models)}"
        )
    return models[0]


def _logprob(choice: Any, tokens: int) -> float:
    items = logprob_items(choice.get("logprobs"))
    logprobs = [drawn_logprob(logprob) for _, logprob, _ in items or ()]
    if len(logprobs) != tokens:
        raise FaultError(
            f"a completion of {tokens} tokens came with {len(logprobs)} log-probabilities",
            lasting=True,
        )
    if max(logprobs) > _LARGEST_LOGPROB:
        raise FaultError(
            "its log-probabilities are above 0; vLLM returns logits unless --logprobs-mode is "
            "raw_logprobs or processed_logprobs",
            lasting=True,
        )
    return math.fsum(logprobs)


def _letters(text: str) -> str:
    """Return a text's letters and digits, since tokenizers differ in all other characters."""
    return "".join(filter(str.isalnum, text))


def _group(prompt: EncodedPrompt, draws: Sequence[Draw]) -> Group:
    return Group(
        prompt_id=prompt.prompt_id,
        prompt=prompt.prompt,
        prompt_token_ids=prompt.token_ids,
        completions=tuple(draw.text for draw in draws),
        token_ids=tuple(draw.token_ids for draw in draws),
        logprobs=tuple(draw.logprob for draw in draws),
        finish_reasons=tuple(draw.finish_reason for draw in draws),
    )
