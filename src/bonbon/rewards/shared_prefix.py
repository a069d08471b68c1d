"""Scores of a causal classifier where rows share a beginning that is read only once.

In a causal model the later tokens of a row need only the keys and values of the beginning, which
are the same for all rows that share it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bonbon.models.forward import cache_parameter, supports_cached_prompt
from bonbon.models.padding import Tokens, pad, positions, token_batches

# A row's copy of the prefix counts against the batch's tokens: 1/8 of it on a CPU, where copying is
# cheap, and all of it elsewhere, where memory is the limit.
_CPU_COPY_SHARE = 8
_AGREED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Beginning:
    """The common first `length` tokens of some rows, given by their indices."""

    rows: tuple[int, ...]
    length: int


def shared_beginnings(
    prompts: Sequence[Any], rows: Sequence[Tokens], pad_id: int
) -> list[Beginning]:
    """Return the beginnings of neighbouring rows with equal prompts that are worth sharing.

    Those that save a quarter of the tokens, as in training. A token other than `pad_id` follows
    each beginning, since the model takes the last such token as the row's end.
    """
    beginnings, start = [], 0
    for _, same in groupby(prompts):
        end = start + len(list(same))
        group = rows[start:end]
        length = min(_alike(group), *(_last_token(row, pad_id) for row in group))
        if 4 * (end - start - 1) * length >= sum(map(len, group)) > 0:
            beginnings.append(Beginning(tuple(range(start, end)), length))
        start = end
    return beginnings


def _alike(rows: Sequence[Tokens]) -> int:
    """Return how many first tokens all rows have in common."""
    columns = enumerate(zip(*rows, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, rows)))


def _last_token(row: Tokens, pad_id: int) -> int:
    """Return the last column that is not padding; 0 if all are."""
    return next((i for i in range(len(row) - 1, 0, -1) if row[i] != pad_id), 0)


def reads_beginnings_once(model: PreTrainedModel) -> bool:
    """Return whether a classifier is causal, with a cache of only keys and values of all columns.

    Configurations are not reliable here, so it is also tried once on a few tokens.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or not getattr(config, "is_causal", True):
        return False
    layers = DynamicCache(config=config).layers if supports_cached_prompt(model) else []
    if not layers or not all(type(layer) is DynamicLayer for layer in layers):
        return False
    if model not in _AGREED:
        _AGREED[model] = _agrees(model)
    return _AGREED[model]


@torch.inference_mode()
def _agrees(model: PreTrainedModel) -> bool:
    """Return whether two short rows have equal scores with and without a shared beginning."""
    pad_id = model.config.pad_token_id
    tokens = [i for i in range(min(8, model.config.get_text_config().vocab_size)) if i != pad_id]
    rows = [(*tokens[:3], *tokens[3:5]), (*tokens[:3], tokens[-1])]
    try:
        alone = [torch.tensor([row], device=model.device) for row in rows]
        plain = [float(model(input_ids=ids).logits) for ids in alone]
        shared = _scores(model, rows, [Beginning((0, 1), 3)], -1 if pad_id is None else pad_id, 64)
    except Exception:  # the model's own code may raise anything
        return False
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 2e-2
    size = 1 + max(map(abs, plain))
    return all(abs(shared[i] - score) < tolerance * size for i, score in enumerate(plain))


def scores_by_beginnings(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    beginnings: Sequence[Beginning],
    pad_id: int,
    max_tokens: int,
) -> dict[int, float]:
    """Return the score of each row of the beginnings, by its index.

    At most `max_tokens` padded tokens, of beginnings or of their continuations, are read at once.
    """
    scores: dict[int, float] = {}
    lengths = [beginning.length for beginning in beginnings]
    for batch in token_batches(beginnings, lengths, max_tokens):
        scores |= _scores(model, rows, [beginnings[i] for i in batch], pad_id, max_tokens)
    return scores


@torch.inference_mode()
def _scores(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    beginnings: Sequence[Beginning],
    pad_id: int,
    max_tokens: int,
) -> dict[int, float]:
    heads = [rows[beginning.rows[0]][: beginning.length] for beginning in beginnings]
    ids, mask = (x.to(model.device) for x in pad(heads, pad_id, "left"))
    cache = DynamicCache(config=model.config.get_text_config())
    _forward(model, cache, ids, mask, positions(mask))
    line_of = {row: line for line, beginning in enumerate(beginnings) for row in beginning.rows}
    order = list(line_of)
    tails = [rows[row][beginnings[line].length :] for row, line in line_of.items()]
    share = _CPU_COPY_SHARE if model.device.type == "cpu" else 1
    lengths = [len(tail) + mask.shape[1] // share for tail in tails]
    scores: dict[int, float] = {}
    for batch in token_batches(tails, lengths, max_tokens):
        chosen = [order[index] for index in batch]
        lines = torch.tensor([line_of[row] for row in chosen], device=model.device)
        padded = pad([tails[index] for index in batch], pad_id, "right")
        own, own_mask = (x.to(model.device) for x in padded)
        whole = torch.cat([mask[lines], own_mask], dim=1)
        position = positions(whole)[:, mask.shape[1] :]
        logits = _forward(model, _selected(cache, lines), own, whole, position)
        scores |= dict(zip(chosen, logits.squeeze(-1).double().tolist(), strict=True))
    return scores


def _forward(
    model: PreTrainedModel,
    cache: DynamicCache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Return the logits at each row's last token that is not padding, (rows, 1)."""
    with_cache = {str(cache_parameter(model)): cache, "use_cache": True}
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=position, **with_cache
    ).logits
    return logits


def _selected(cache: DynamicCache, lines: torch.Tensor) -> DynamicCache:
    """Return a copy with these lines; the cache is unchanged."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(lines)
    return selected
