"""The text of drawn tokens, cut at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

# A text is decoded behind this many tokens before it, for the spaces between.
_CONTEXT = 8


def completion_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The completion's text as it stands behind the prompt.

    Many tokenizers drop a text's first space when decoding, so the completion is decoded behind
    the prompt's last tokens and these are taken off again.
    """
    head_ids = list(prompt_ids[-_CONTEXT:])
    head = tokenizer.decode(head_ids, skip_special_tokens=True)
    whole = tokenizer.decode(head_ids + list(ids), skip_special_tokens=True)
    if whole.startswith(head):
        return str(whole[len(head) :])
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of the stop strings in it; None where there is none."""
    found = [place for place in (text.find(string) for string in stop) if place >= 0]
    return text[: min(found)] if found else None
