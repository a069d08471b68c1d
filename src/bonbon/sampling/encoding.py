"""Prompts as tokens that fit the context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.models.loading import apply_chat_template
from bonbon.models.padding import kept_when_cut
from bonbon.system.errors import BonbonError

OnLongPrompt = Literal["error", "skip", "truncate"]


_LONG_NAMED = 10  # prompts that an error names


def prompts_for(
    rows: Iterable[PromptRow], tokenizer: Tokenizer, context: int | None, sampling: SamplingConfig
) -> Iterator[EncodedPrompt]:
    """Prompts as a sampler of these settings reads them; see `iter_encoded`.

    `context` is the most tokens that a prompt and its completion may have; None: any number.
    """
    max_tokens = None if context is None else prompt_room(context, sampling)
    return iter_encoded(
        rows, tokenizer, max_tokens=max_tokens, on_long_prompt=sampling.on_long_prompt
    )


def prompt_room(context: int, sampling: SamplingConfig) -> int:
    """The tokens that a context leaves for a prompt beside the longest completion."""
    return context - sampling.max_new_tokens


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
