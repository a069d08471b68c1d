"""Forgetting: how well a model predicts human text, before training and after.

A model that lost language ability for reward has a higher perplexity on human text than its base
model. Losses are kept per text, so that figures have intervals over texts and are paired between
models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.evaluation.figures import Figure, Floats, bootstrap
from bonbon.evaluation.kl import whole_logits_batch_tokens
from bonbon.groups.tables import check_text, read_records
from bonbon.models.loading import context_length, devices_of, forward_batch_tokens
from bonbon.models.logprobs import completion_log_probs
from bonbon.models.padding import PaddedRows, pad_rows, token_batches
from bonbon.system.errors import BonbonError


@dataclass(frozen=True)
class TextLosses:
    """A model's losses on texts, each array of shape (texts,).

    `nats`: −Σ ln p of the scored tokens; `tokens`: their number; `bytes`: the UTF-8 bytes of
    their text.
    """

    nats: Floats
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]


@torch.no_grad()  # not inference mode: chunked logits check tensor versions, which it lacks
def human_text_losses(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_batch_tokens: int | None = None,
) -> TextLosses:
    """Compute each text's loss under a model in evaluation mode, as one sequence.

    All tokens are scored except the first, which has no context: the begin token where the
    tokenizer adds one, else the text's own first token. A text longer than the model's context is
    cut, and the rest is not counted. A text of fewer than two tokens has zeros everywhere.

    Raises BonbonError when no text has two tokens or more.
    """
    longest = context_length(model)
    encoded = [_encode(tokenizer, text, longest) for text in texts]
    rows = [ids for ids, _ in encoded]
    scored = [index for index, ids in enumerate(rows) if len(ids) > 1]
    if not scored:
        raise BonbonError(
            f"none of the {len(texts)} texts has two tokens or more, so there is nothing to "
            "predict; give longer texts"
        )
    nats = np.zeros(len(rows))
    in_chunks = len(devices_of(model)) <= 1  # else all logits are computed at once
    batch_tokens = forward_batch_tokens(max_batch_tokens, model.device)
    max_tokens = batch_tokens if in_chunks else whole_logits_batch_tokens(model, batch_tokens)
    for batch in token_batches(scored, [len(rows[index]) for index in scored], max_tokens):
        chosen = [scored[index] for index in batch]
        nats[chosen] = _nats(model, [rows[index] for index in chosen])
    tokens = [max(len(ids) - 1, 0) for ids in rows]
    return TextLosses(nats, np.array(tokens), np.array([size for _, size in encoded]))


def _encode(tokenizer: Tokenizer, text: str, longest: int | None) -> tuple[list[int], int]:
    """Encode a text, cut at `longest` tokens; also count the bytes of all tokens but the first."""
    # Not `verbose`, which warns of long texts; they are cut here.
    encoded: Any = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"][:longest]
    if len(ids) < 2:
        return ids, 0
    if not tokenizer.is_fast:  # slow tokenizers have no offsets
        return ids, len(tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
    ends = [end for _, end in encoded["offset_mapping"][:longest]]  # 0 for a special token
    return ids, len(text[ends[0] : max(ends)].encode())


def _nats(model: PreTrainedModel, rows: Sequence[list[int]]) -> Floats:
    """Compute −Σ ln p of each row's tokens after the first, shape (rows,)."""
    padded = pad_rows([ids[:1] for ids in rows], [ids[1:] for ids in rows], 0)
    placed = PaddedRows(**{name: ids.to(model.device) for name, ids in vars(padded).items()})
    return np.asarray(-completion_log_probs(model, placed).double().cpu())


# --- figures --------------------------------------------------------------------------------------


def perplexity(losses: TextLosses, resamples: int = 2000) -> Figure:
    """Compute exp(Σ nats / Σ tokens), with its bootstrap interval over texts.

    Comparable between models of one tokenizer only.
    """
    return _ratio(losses, losses.nats, losses.tokens, np.exp, resamples)


def bits_per_byte(losses: TextLosses, resamples: int = 2000) -> Figure:
    """Compute Σ nats / (ln 2 · Σ bytes), with its bootstrap interval over texts.

    Comparable between tokenizers if both add a begin token and no text was cut.
    """
    return _ratio(losses, losses.nats / math.log(2), losses.bytes, np.asarray, resamples)


def forgetting(after: TextLosses, before: TextLosses, resamples: int = 2000) -> Figure:
    """Compute the change in nats a token, paired over texts; its exp is the perplexities' ratio.

    Positive if the model predicts the texts worse than before. Raises ValueError when the two did
    not score the same tokens.
    """
    if not np.array_equal(after.tokens, before.tokens):
        raise ValueError("the losses before and after are of different texts or tokenizers")
    return _ratio(after, after.nats - before.nats, after.tokens, np.asarray, resamples)


def _ratio(
    losses: TextLosses,
    numerator: Floats,
    denominator: NDArray[np.int64],
    transform: Callable[[Floats], ArrayLike],
    resamples: int,
) -> Figure:
    """Compute `transform`(Σ numerator / Σ denominator) over the texts with scored tokens."""
    some = losses.tokens > 0  # else a resample could have no tokens at all
    return bootstrap(
        (numerator[some], denominator[some].astype(np.float64)),
        lambda above, below: transform(above / below),
        resamples,
    )


# --- reading texts --------------------------------------------------------------------------------


def read_texts(path: Path, column: str = "text", limit: int | None = None) -> list[str]:
    """Read the texts in a column of a JSONL, CSV or Parquet file, or the lines of a text file.

    Raises BonbonError, naming file and row, as `groups.prompts.read_prompts`: for an unknown file
    type, a missing column, text that is not UTF-8, a broken row, an empty text, or no texts.
    """
    texts: list[str] = []
    for number, record in read_records(path):
        where = f"{path}, row {number}"
        if path.suffix.lower() == ".txt":  # its lines have no named columns
            record = dict.fromkeys([column], *record.values())
        if column not in record:
            names = ", ".join(map(str, record)) or "none"
            raise BonbonError(
                f"{where}: no column {column!r} (columns: {names}); name it with "
                "evaluation.human_text.column"
            )
        texts.append(_checked_text(record[column], where))
        if len(texts) == limit:
            break
    if not texts:
        raise BonbonError(f"{path}: no texts in the file")
    return texts


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BonbonError(f"{where}: expected a text, not {value!r:.80}")
    check_text(value, "text", where)
    if not value.strip():
        raise BonbonError(f"{where}: the text is empty")
    return value
