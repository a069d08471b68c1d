"""Batches of prompts and completions as padded tensors.

Prompts are padded on the left and completions on the right, so that all completions of a batch
start in the same column and only the last columns' logits have to be computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Row = TypeVar("Row")
Tokens = Sequence[int]


@dataclass(frozen=True)
class PaddedRows:
    """Rows of prompt and completion, B rows of P + C columns.

    `input_ids`, `attention_mask`, `position_ids`: (B, P + C); `completion_mask`: (B, C).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    completion_mask: torch.Tensor

    @property
    def completion_ids(self) -> torch.Tensor:
        """The completions' tokens, (B, C), padded on the right."""
        return self.input_ids[:, -self.completion_mask.shape[1] :]


def pad(rows: Sequence[Tokens], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of token ids as (ids, mask), both (B, longest), padded on `side`."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.long)
        mask[index, columns] = 1
    return ids, mask


def pad_rows(prompts: Sequence[Tokens], completions: Sequence[Tokens], pad_id: int) -> PaddedRows:
    """Return one padded row for each (prompt, completion)."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left")
    completion_ids, completion_mask = pad(completions, pad_id, "right")
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    return PaddedRows(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=mask,
        position_ids=positions(mask),
        completion_mask=completion_mask,
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return position ids for an attention mask, (B, L): 0 at each row's first real token."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def kept_when_cut(ids: Tokens, longest: int, special: Collection[int]) -> list[int]:
    """Return the columns that stay when a row is cut to `longest` tokens at its start.

    A leading special token remains (a begin token, or the one whose state a classifier reads).
    """
    head = [0] if ids and ids[0] in special and longest > 1 else []
    tail = max(len(head), len(ids) - longest + len(head))
    return [*head, *range(tail, len(ids))]


def token_batches(
    rows: Sequence[Row], lengths: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    """Yield indices of `rows` in batches of similar length, of at most `max_tokens` padded tokens.

    Longest first, so that running out of memory shows at once. A row longer than `max_tokens` is a
    batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
