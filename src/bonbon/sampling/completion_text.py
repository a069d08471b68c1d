"""The text of drawn tokens, cut at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

# Tokens before a text that are decoded with it, so that its first space is kept.
CONTEXT_TOKENS = 8


def completion_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Decode a completion's text as it follows the prompt.

    Many tokenizers drop a text's first space when decoding, so the completion is decoded together
    with the prompt's last tokens, whose text is then removed.
    """
    head_ids = list(prompt_ids[-CONTEXT_TOKENS:])
    head = tokenizer.decode(head_ids, skip_special_tokens=True)
    whole = tokenizer.decode(head_ids + list(ids), skip_special_tokens=True)
    if whole.startswith(head):
        return str(whole[len(head) :])
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """Return the text before its first stop string; None where it has none."""
    starts = [start for start in (text.find(string) for string in stop) if start >= 0]
    return text[: min(starts)] if starts else None
