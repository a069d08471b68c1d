"""A key-value cache that grows in blocks.

transformers' `DynamicCache` concatenates at every token, so drawing T tokens copies O(T²) cache
entries; for a small model that is half of the sampling time. Here the tensors have spare columns
for new keys and values, and are copied only when a block is full.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

_BLOCK = 64


class BlockGrowingLayer(DynamicLayer):
    """`DynamicLayer` with spare columns: `keys` and `values` are views of longer buffers."""

    keys: torch.Tensor
    values: torch.Tensor
    _key_buffer: torch.Tensor | None = None
    _value_buffer: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, new, head dim) and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._key_buffer, self.keys = _append(self._key_buffer, self.keys, key_states)
        self._value_buffer, self.values = _append(self._value_buffer, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, which may repeat, and free the old buffers at once."""
        super().batch_select_indices(indices)
        self._key_buffer = self._value_buffer = None


def _append(
    buffer: torch.Tensor | None, kept: torch.Tensor, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    start = kept.shape[-2] if kept.numel() else 0
    end = start + new.shape[-2]
    # Repeating or selecting rows has replaced `kept` by a tensor outside the buffer.
    if buffer is None or kept.data_ptr() != buffer.data_ptr() or end > buffer.shape[-2]:
        buffer = new.new_empty((*new.shape[:-2], end + _BLOCK, new.shape[-1]))
        if start:
            buffer[..., :start, :] = kept
    buffer[..., start:end, :] = new
    return buffer, buffer[..., :end, :]


def block_growing_cache(config: PretrainedConfig) -> DynamicCache:
    """Return a `DynamicCache` for a model's config whose full-attention layers grow in blocks."""
    cache = DynamicCache(config=config)
    cache.layers = [
        BlockGrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
