"""Drawing n completions a prompt from the base distribution.

The base model of every formula is the model *with its sampling settings*: at temperature 1, top-p 1
and no top-k it is the model itself; any other setting defines a different base model, so the
settings are stored with the groups and the log-probabilities are those of the drawn tokens under
them.

How a draw is made reproducible: completion k of a prompt owns a counter-based random stream
(Philox) keyed by a hash of (seed, stream, prompt id, k), and its t-th token is the inverse CDF of
the next-token distribution at the stream's t-th uniform number. No draw depends on what else is in
the batch, on its order or its size. What is left is arithmetic: matrix products of different batch
shapes may differ in the last bits, so a token whose CDF boundary lies that close to its uniform
number (about one in a million in float32) may come out differently; in float64 none does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.batching import kept_when_cut, pad, positions, token_batches
from bonbon.cache import block_growing_cache
from bonbon.config import SamplingConfig
from bonbon.errors import BonbonError
from bonbon.groups import Group, Prompt
from bonbon.logprobs import cache_parameter, forward_parameters, full_precision, last_logits
from bonbon.models import apply_chat_template, context_length, end_token_ids
from bonbon.prompts import PromptRow

# At most this many float64 CDF entries are held at once while drawing.
_CDF_ENTRIES = 16_000_000


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and the tokens that the model is conditioned on."""

    prompt_id: str
    prompt: Prompt
    token_ids: tuple[int, ...]


class Sampler(Protocol):
    """Anything that turns prompts into groups of `config.n` completions."""

    config: SamplingConfig

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """One group a prompt, in the order of `prompts`.

        `progress` is called with the number of tokens drawn since its last call.
        """
        ...


def encode_prompts(
    rows: Sequence[PromptRow],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    on_long_prompt: Literal["error", "skip", "truncate"] = "error",
) -> list[EncodedPrompt]:
    """Tokenise prompts: a text as it is, messages through the chat template.

    A prompt of more than `max_tokens` tokens (the context less the room for the completion) is an
    error that lists the ids, is left out (`skip`), or loses tokens at its beginning, behind a
    leading special token (`truncate`, plain text only: cutting into a chat template would change
    who speaks).

    Raises BonbonError for long prompts, for messages without a chat template, or when every prompt
    is skipped.
    """
    encoded = [EncodedPrompt(row.prompt_id, row.prompt, _encode(row, tokenizer)) for row in rows]
    if max_tokens is None:
        return encoded
    if max_tokens < 1:
        raise BonbonError(
            "max_new_tokens leaves no room for a prompt in the model's context; lower it"
        )
    long = [prompt for prompt in encoded if len(prompt.token_ids) > max_tokens]
    if long and on_long_prompt == "error":
        names = ", ".join(f"{p.prompt_id} ({len(p.token_ids)} tokens)" for p in long[:10])
        more = f" and {len(long) - 10} more" if len(long) > 10 else ""
        raise BonbonError(
            f"{len(long)} prompts have more than the {max_tokens} tokens that the model's context "
            f"leaves for them: {names}{more}; shorten them, lower max_new_tokens, or set "
            "--on-long-prompt skip|truncate"
        )
    if on_long_prompt == "truncate":
        special = tokenizer.all_special_ids
        return [_truncated(prompt, max_tokens, special) for prompt in encoded]
    kept = [prompt for prompt in encoded if len(prompt.token_ids) <= max_tokens]
    if not kept and encoded:
        raise BonbonError(f"every prompt is longer than {max_tokens} tokens; none is left")
    return kept


def _encode(row: PromptRow, tokenizer: Tokenizer) -> tuple[int, ...]:
    if isinstance(row.prompt, str):
        ids = list(tokenizer(row.prompt)["input_ids"])
        # Some tokenizers close every text with the end token; a prompt goes on. One that the
        # prompt itself ends with stays.
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            bare = tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
            if bare[-1:] != [tokenizer.eos_token_id]:
                ids.pop()
    elif tokenizer.chat_template is None:
        raise BonbonError(
            f"prompt {row.prompt_id} is a list of messages, but the model's tokenizer has no chat "
            "template; use a chat model or plain-text prompts"
        )
    else:
        ids = apply_chat_template(tokenizer, row.prompt, add_generation_prompt=True)["input_ids"]
    if not ids:
        raise BonbonError(f"prompt {row.prompt_id} has no tokens; leave it out")
    return tuple(ids)


def _truncated(prompt: EncodedPrompt, max_tokens: int, special: list[int]) -> EncodedPrompt:
    if len(prompt.token_ids) <= max_tokens:
        return prompt
    if not isinstance(prompt.prompt, str):
        raise BonbonError(
            f"prompt {prompt.prompt_id} is a chat of {len(prompt.token_ids)} tokens (at most "
            f"{max_tokens} fit) and is not cut; shorten it or set --on-long-prompt skip"
        )
    columns = kept_when_cut(prompt.token_ids, max_tokens, special)
    ids = tuple(prompt.token_ids[column] for column in columns)
    return EncodedPrompt(prompt.prompt_id, prompt.prompt, ids)


def warped_log_probs(
    logits: torch.Tensor, config: SamplingConfig, drawn: torch.Tensor | None = None
) -> torch.Tensor:
    """Next-token log-probabilities under the sampling settings, (rows, vocabulary), in nats.

    Computed in float32, or in float64 for float64 logits. `drawn`, (rows,), are tokens that top-k
    and top-p are known to have left: computed again in another batch, in 16 bits, a cut may fall
    one token short.
    """
    scores = full_precision(logits)
    warpers = LogitsProcessorList()
    if config.temperature != 1:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k > 0:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    warped = warpers(None, scores)
    if drawn is not None and config.truncates:
        kept = scores.gather(-1, drawn[:, None]) / config.temperature
        warped = warped.scatter(-1, drawn[:, None], kept.to(warped.dtype))
    return warped.log_softmax(dim=-1)


def draw_tokens(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The inverse CDF of each row of `log_probs` (rows, vocabulary) at `uniforms` (rows,)."""
    rows_at_once = max(1, _CDF_ENTRIES // log_probs.shape[-1])
    drawn = []
    for start in range(0, len(log_probs), rows_at_once):
        chunk = slice(start, start + rows_at_once)
        cdf = log_probs[chunk].exp().cumsum(dim=-1, dtype=torch.float64)
        target = uniforms[chunk, None] * cdf[:, -1:]
        drawn.append(torch.searchsorted(cdf, target, right=True).squeeze(-1))
    return torch.cat(drawn).clamp(max=log_probs.shape[-1] - 1)


def uniform_stream(seed: int, stream: str, prompt_id: str, k: int, count: int) -> np.ndarray:
    """The first `count` uniform numbers of completion k's random stream, float64 in [0, 1)."""
    name = f"{seed}\0{stream}\0{prompt_id}\0{k}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


class TransformersSampler:
    """Samples with a transformers model: each prompt is prefilled once and its cache expanded to n.

    Args:
        model: a causal language model in evaluation mode.
        processing_class: its tokenizer.
        config: what to draw.
        stream: names the random stream; samplers of two models that are to be compared need
            different ones, or their draws would be correlated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Tokenizer,
        config: SamplingConfig,
        stream: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = processing_class
        self.config = config
        self.stream = stream
        self._ends = torch.tensor(end_token_ids(model, processing_class), device=model.device)

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """`encode_prompts` for this model's context and this sampler's settings."""
        context = context_length(self.model)
        return encode_prompts(
            rows,
            self.tokenizer,
            max_tokens=None if context is None else context - self.config.max_new_tokens,
            on_long_prompt=self.config.on_long_prompt,
        )

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """See `Sampler.sample`."""
        n, longest = self.config.n, self.config.max_new_tokens
        lengths = [n * (len(prompt.token_ids) + longest) for prompt in prompts]
        groups: dict[int, Group] = {}
        for batch in token_batches(prompts, lengths, self.config.max_batch_tokens):
            chosen = [prompts[index] for index in batch]
            for index, group in zip(batch, self._sample_batch(chosen, progress), strict=True):
                groups[index] = group
        return [groups[index] for index in range(len(prompts))]

    def _sample_batch(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None
    ) -> list[Group]:
        """Groups for prompts that fit the token budget together, or for one that alone does not."""
        config = self.config
        row_tokens = max(len(prompt.token_ids) for prompt in prompts) + config.max_new_tokens
        per_pass = min(config.n, max(1, config.max_batch_tokens // (row_tokens * len(prompts))))
        drawn: list[list[tuple[list[int], float]]] = [[] for _ in prompts]
        for start in range(0, config.n, per_pass):
            ks = range(start, min(start + per_pass, config.n))
            rows = self._draw(prompts, ks, progress)
            for index, found in enumerate(drawn):
                found.extend(rows[index * len(ks) : (index + 1) * len(ks)])
        return [self._group(*pair) for pair in zip(prompts, drawn, strict=True)]

    @torch.inference_mode()
    def _draw(
        self,
        prompts: Sequence[EncodedPrompt],
        ks: range,
        progress: Callable[[int], Any] | None,
    ) -> list[tuple[list[int], float]]:
        """Token ids and summed log-probability of completions `ks` of each prompt, prompt-major."""
        config, device = self.config, self.model.device
        pad_id = self.tokenizer.pad_token_id or 0
        ids, mask = (x.to(device) for x in pad([p.token_ids for p in prompts], pad_id, "left"))
        cache = block_growing_cache(self.model.config)
        # The states of linear attention cannot be expanded or dropped row by row; for models with
        # such layers the prompt is prefilled n times and finished rows stay.
        by_row = all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers)
        if not by_row:
            ids, mask = (x.repeat_interleave(len(ks), dim=0) for x in (ids, mask))
        logits = self._next_logits(ids, mask, positions(mask), cache)
        if by_row:
            cache.batch_repeat_interleave(len(ks))
            logits, mask = (x.repeat_interleave(len(ks), dim=0) for x in (logits, mask))
        uniforms = torch.from_numpy(
            np.stack(
                [
                    uniform_stream(
                        config.seed, self.stream, prompt.prompt_id, k, config.max_new_tokens
                    )
                    for prompt in prompts
                    for k in ks
                ]
            )
        ).to(device)
        rows = len(mask)
        tokens = torch.full((rows, config.max_new_tokens), -1, device=device)
        totals = torch.zeros(rows, dtype=torch.float64, device=device)
        position = mask.sum(dim=-1)
        active = torch.arange(rows, device=device)  # the row that each line of the batch draws
        for step in range(config.max_new_tokens):
            log_probs = warped_log_probs(logits, config)
            token = draw_tokens(log_probs, uniforms[active, step])
            going = tokens[active, step - 1] >= 0 if step else torch.ones_like(token).bool()
            going &= ~torch.isin(tokens[active, step - 1], self._ends) if step else going
            picked = log_probs.gather(-1, token[:, None]).squeeze(-1).double()
            tokens[active, step] = torch.where(going, token, -1)
            totals[active] += torch.where(going, picked, 0.0)
            if progress is not None:
                progress(int(going.sum()))
            going &= ~torch.isin(token, self._ends)
            alive = int(going.sum())
            if alive == 0 or step == config.max_new_tokens - 1:
                break
            # Dropping finished rows copies the cache, so it waits until an eighth can go.
            if by_row and alive <= len(going) * 7 / 8:
                keep = going.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                active, mask, token, position = (x[keep] for x in (active, mask, token, position))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._next_logits(token[:, None], mask, position[:, None], cache)
            position = position + 1
        return [
            ([token for token in row if token >= 0], total)
            for row, total in zip(tokens.tolist(), totals.tolist(), strict=True)
        ]

    def _next_logits(
        self, ids: torch.Tensor, mask: torch.Tensor, position: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """The logits behind each row, (rows, vocabulary); `cache` takes the new keys and values."""
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        inputs[cache_parameter(self.model) or "past_key_values"] = cache
        if "position_ids" in forward_parameters(self.model):
            inputs["position_ids"] = position
        return last_logits(self.model, 1, **inputs)[:, -1]

    def _group(self, prompt: EncodedPrompt, drawn: list[tuple[list[int], float]]) -> Group:
        ends = set(self._ends.tolist())
        return Group(
            prompt_id=prompt.prompt_id,
            prompt=prompt.prompt,
            prompt_token_ids=prompt.token_ids,
            completions=tuple(self.text(prompt.token_ids, ids) for ids, _ in drawn),
            token_ids=tuple(tuple(ids) for ids, _ in drawn),
            logprobs=tuple(total for _, total in drawn),
            finish_reasons=tuple("stop" if ids[-1] in ends else "length" for ids, _ in drawn),
        )

    def text(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The completion's text as it stands behind the prompt.

        Many tokenizers drop a text's first space when decoding, so the completion is decoded behind
        the prompt's last tokens and these are taken off again.
        """
        head_ids = list(prompt_ids[-8:])
        head = self.tokenizer.decode(head_ids, skip_special_tokens=True)
        whole = self.tokenizer.decode(head_ids + list(ids), skip_special_tokens=True)
        if whole.startswith(head):
            return str(whole[len(head) :])
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
