"""Drawing n completions a prompt from the base distribution.

The base model of every formula is the model *with its sampling settings*: at temperature 1, top-p 1
and no top-k it is the model itself; any other setting defines a different base model, so the
settings are stored with the groups and the log-probabilities are those of the drawn tokens under
them. How a draw is made reproducible: see `bonbon.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.batching import kept_when_cut, token_batches
from bonbon.config import SamplingConfig
from bonbon.decoding.strategy import Candidates, Cost, timed
from bonbon.errors import BonbonError
from bonbon.groups import Group
from bonbon.models import apply_chat_template, context_length, devices_of
from bonbon.prompts import EncodedPrompt, PromptRow
from bonbon.rows import Decoder, Row, Rows


class Sampler(Protocol):
    """Anything that turns prompts into groups of `config.n` completions."""

    config: SamplingConfig

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """The prompts as the model reads them. Raises BonbonError as `encode_prompts` does."""
        ...

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """One group a prompt, in the order of `prompts`.

        `progress` is called with the number of tokens drawn since its last call.
        """
        ...

    def described(self) -> dict[str, Any]:
        """Plain values that say what drew, for the provenance of the groups."""
        ...

    def close(self) -> None:
        """Let go of what it holds: an engine, its processes, its connections."""
        ...


OnLongPrompt = Literal["error", "skip", "truncate"]
_LONG_NAMED = 10  # prompts that an error names


def encode_prompts(
    rows: Iterable[PromptRow],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    on_long_prompt: OnLongPrompt = "error",
) -> list[EncodedPrompt]:
    """All prompts, tokenised; see `iter_encoded`."""
    return list(iter_encoded(rows, tokenizer, max_tokens=max_tokens, on_long_prompt=on_long_prompt))


def iter_encoded(
    rows: Iterable[PromptRow],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    on_long_prompt: OnLongPrompt = "error",
) -> Iterator[EncodedPrompt]:
    """Tokenise prompts: a text as it is, messages through the chat template.

    A prompt of more than `max_tokens` tokens (the context less the room for the completion) is an
    error that lists the ids, is left out (`skip`), or loses tokens at its beginning, behind a
    leading special token (`truncate`, plain text only: cutting into a chat template would change
    who speaks).

    Raises BonbonError for messages without a chat template and, once all are read, for long prompts
    or when every prompt is skipped.
    """
    if max_tokens is not None and max_tokens < 1:
        raise BonbonError(
            "max_new_tokens leaves no room for a prompt in the model's context; lower it"
        )
    long: list[str] = []
    kept = left_out = 0
    for row in rows:
        prompt = EncodedPrompt(row.prompt_id, row.prompt, _encode(row, tokenizer))
        if max_tokens is not None and len(prompt.token_ids) > max_tokens:
            if on_long_prompt != "truncate":
                left_out += 1
                if len(long) < _LONG_NAMED:
                    long.append(f"{row.prompt_id} ({len(prompt.token_ids)} tokens)")
                continue
            prompt = _truncated(prompt, max_tokens, tokenizer.all_special_ids)
        kept += 1
        yield prompt
    if left_out and on_long_prompt == "error":
        more = f" and {left_out - len(long)} more" if left_out > len(long) else ""
        raise BonbonError(
            f"{left_out} prompts have more than the {max_tokens} tokens that the model's context "
            f"leaves for them: {', '.join(long)}{more}; shorten them, lower max_new_tokens, or set "
            "--on-long-prompt skip|truncate"
        )
    if left_out and not kept:
        raise BonbonError(f"every prompt is longer than {max_tokens} tokens; none is left")


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
    if not isinstance(prompt.prompt, str):
        raise BonbonError(
            f"prompt {prompt.prompt_id} is a chat of {len(prompt.token_ids)} tokens (at most "
            f"{max_tokens} fit) and is not cut; shorten it or set --on-long-prompt skip"
        )
    columns = kept_when_cut(prompt.token_ids, max_tokens, special)
    ids = tuple(prompt.token_ids[column] for column in columns)
    return EncodedPrompt(prompt.prompt_id, prompt.prompt, ids)


class TransformersSampler:
    """Samples with a transformers model: each prompt is prefilled once and its cache expanded to n.

    Args:
        model: a causal language model in evaluation mode.
        processing_class: its tokenizer.
        config: what to draw.
        stream: names the random stream; samplers of two models that are to be compared need
            different ones, or their draws would be correlated.
        stop: strings at whose first appearance a completion ends.

    Raises BonbonError for a model whose layers are on several devices.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Tokenizer,
        config: SamplingConfig,
        stream: str = "",
        stop: tuple[str, ...] = (),
    ) -> None:
        if len(devices_of(model)) > 1:
            raise BonbonError(
                "sampler: transformers draws from a model on one device; to spread one over "
                "several, use sampler: vllm with tensor_parallel_size"
            )
        self.model = model
        self.tokenizer = processing_class
        self.config = config
        self.stream = stream
        self.stop = stop

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """`encode_prompts` for this model's context and this sampler's settings."""
        context = context_length(self.model)
        return encode_prompts(
            rows,
            self.tokenizer,
            max_tokens=None if context is None else context - self.config.max_new_tokens,
            on_long_prompt=self.config.on_long_prompt,
        )

    def described(self) -> dict[str, Any]:
        """See `Sampler.described`."""
        return {"dtype": str(self.model.dtype).removeprefix("torch.")}

    def close(self) -> None:
        """See `Sampler.close`; the model is its owner's."""

    def decoder(self, progress: Callable[[int], Any] | None = None) -> Decoder:
        """What `Rows` of this sampler are drawn by."""
        return Decoder(self.model, self.tokenizer, self.config, self.stream, self.stop, progress)

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """See `Sampler.sample`."""
        found = self.draw(prompts, [range(self.config.n)] * len(prompts), progress)
        return [candidates.group for candidates in found]

    def draw(
        self,
        prompts: Sequence[EncodedPrompt],
        ks: Sequence[range],
        progress: Callable[[int], Any] | None = None,
    ) -> list[Candidates]:
        """Completions `ks[i]` of each prompt's sequence of draws, and what they cost.

        The seconds are each prompt's share of its batch.
        """
        decoder = self.decoder(progress)
        longest = self.config.max_new_tokens
        lengths = [
            len(numbers) * (len(prompt.token_ids) + longest)
            for prompt, numbers in zip(prompts, ks, strict=True)
        ]
        drawn: dict[int, Candidates] = {}
        for batch in token_batches(prompts, lengths, self.config.max_batch_tokens):
            chosen = [(prompts[index], ks[index]) for index in batch]
            found, seconds = timed(self._draw_batch, decoder, chosen)
            for index, (group, prefilled) in zip(batch, found, strict=True):
                tokens = sum(group.lengths())
                cost = Cost(tokens, prefilled, seconds=seconds / len(batch))
                drawn[index] = Candidates(group, cost)
        return [drawn[index] for index in range(len(prompts))]

    def _draw_batch(
        self, decoder: Decoder, batch: Sequence[tuple[EncodedPrompt, range]]
    ) -> list[tuple[Group, int]]:
        """Groups, and the prompt tokens read for each.

        The prompts fit the token budget together, or are one that alone does not and is drawn in
        several passes.
        """
        if len(batch) > 1:
            passes = [[numbers for _, numbers in batch]]
        else:
            ((prompt, numbers),) = batch
            row_tokens = len(prompt.token_ids) + self.config.max_new_tokens
            at_once = max(1, self.config.max_batch_tokens // row_tokens)
            starts = range(0, len(numbers), at_once)
            passes = [[numbers[start : start + at_once]] for start in starts]
        prompts = [prompt for prompt, _ in batch]
        found: list[list[Row]] = [[] for _ in prompts]
        prefilled = [0] * len(prompts)
        for numbers_of in passes:
            rows = Rows(decoder, prompts, numbers_of)
            rows.draw(self.config.max_new_tokens)
            for index, (new, read) in enumerate(zip(rows.rows(), rows.prefilled_of(), strict=True)):
                found[index].extend(new)
                prefilled[index] += read
        groups = [decoder.group(*pair) for pair in zip(prompts, found, strict=True)]
        return list(zip(groups, prefilled, strict=True))
