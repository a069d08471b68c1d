"""Attention where the rows of a prompt share one copy of its keys and values.

While n completions of a prompt are drawn, attention is bound by memory: every row reads the keys
and values of its prompt and of its own tokens. Here one matrix product attends from all rows of a
prompt to its keys and values, each row attends to its own separately, and the two softmaxes are
combined by their normalisers. (Juravsky et al., *Hydragen: High-Throughput LLM Inference with
Shared Prefixes*, 2024, arXiv 2402.05099.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from bonbon.models.forward import (
    cache_parameter,
    forward_parameters,
    full_precision,
    last_logits,
    unwrapped,
)
from bonbon.models.growing_cache import BlockGrowingLayer, block_growing_cache

_NAME = "bonbon_shared_prompts"
_LOCK = threading.RLock()  # a model's attention is named in its configuration
_AGREED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# The smallest number of key entries saved a layer and token for which sharing is faster.
_LEAST_SAVED = 2**18


@dataclass(frozen=True)
class SharedPrompts:
    """Keys and values of G prompts, and which of them each of the rows belongs to.

    `layers`: the keys and the values of each layer, (G, heads, P, width); `bias`: (G, 1, 1, P),
    -inf at padding, None without any; `prompt_of`: (rows,). `slots`: (G, m), the rows of each
    prompt, any row where it has fewer than m; `slot_of`: (rows,), where each row stands in these.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    bias: torch.Tensor | None
    prompt_of: torch.Tensor
    slots: torch.Tensor
    slot_of: torch.Tensor

    @classmethod
    def of(cls, cache: DynamicCache, mask: torch.Tensor, prompt_of: torch.Tensor) -> SharedPrompts:
        """Build from the cache of prefilled prompts and their attention mask, (G, P)."""
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        bias = None
        if not bool(mask.all()):
            bias = layers[0][0].new_zeros(mask.shape).masked_fill(mask == 0, -torch.inf)
            bias = bias[:, None, None]
        return cls(layers, bias, prompt_of, *_slots(prompt_of, len(mask)))

    def keep(self, rows: torch.Tensor) -> SharedPrompts:
        """Keep these rows, which may repeat; prompts without rows are freed."""
        kept, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        slots = _slots(prompt_of, len(kept))
        if len(kept) == len(self.slots):
            return replace(self, prompt_of=prompt_of, slots=slots[0], slot_of=slots[1])
        layers = tuple((keys[kept], values[kept]) for keys, values in self.layers)
        bias = None if self.bias is None else self.bias[kept]
        return SharedPrompts(layers, bias, prompt_of, *slots)

    def attend(
        self, layer: int, query: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from each row's queries, (rows, heads, g, width), to its prompt, by `_attend`."""
        prompts, most = self.slots.shape
        keys, values = self.layers[layer]
        together = query[self.slots.flatten()].view(prompts, most, *query.shape[1:])
        together = together.transpose(1, 2).flatten(2, 3)  # (G, heads, m·g, width)
        attended = _attend(together, keys, values, scaling, self.bias)
        apart = (x.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1) for x in attended)
        out, normaliser = (x[self.slot_of] for x in apart)
        return out, normaliser


def _slots(prompt_of: torch.Tensor, prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `slots` and `slot_of` of `SharedPrompts`."""
    counts = prompt_of.bincount(minlength=prompts)
    most, before = int(counts.max()), counts.cumsum(0) - counts
    order = prompt_of.argsort(stable=True)
    lines = torch.arange(len(order), device=order.device)
    slot_of = torch.empty_like(order)
    slot_of[order] = prompt_of[order] * most + lines - before[prompt_of[order]]
    slots = torch.zeros(prompts * most, dtype=torch.long, device=order.device)
    slots[slot_of] = lines
    return slots.view(prompts, most), slot_of


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention, (B, heads, q, width), and ln of its denominator, (B, heads, q, 1).

    The normaliser is the softmax's denominator. In float32, or float64 for float64 queries.
    """
    scores = full_precision((query * scaling) @ keys.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1)
    # The largest weight is exp(its score - normaliser). This takes half the time of a logsumexp.
    largest = weights.amax(dim=-1, keepdim=True).log()
    normaliser = scores.amax(dim=-1, keepdim=True) - largest
    return weights.to(values.dtype) @ values, normaliser


def _attention(
    module: Any,  # an attention layer of transformers
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    shared_prompts: SharedPrompts,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention of one token a row to its prompt and to the row's drawn tokens.

    `query`: (rows, heads, 1, width); `key`, `value`: (rows, key heads, S, width), without prompts.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])  # queries of each key head
    own, own_normaliser = _attend(grouped, key, value, scale)
    prompt, prompt_normaliser = shared_prompts.attend(module.layer_idx, grouped, scale)
    share = (prompt_normaliser - own_normaliser).sigmoid()
    out = torch.lerp(own, prompt, share.to(own.dtype))
    return out.reshape(len(query), 1, -1, value.shape[-1]), None


# No mask function has this name, so transformers makes no mask for it.
AttentionInterface.register(_NAME, _attention)


@contextmanager
def shared_prompt_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use shared-prompt attention in the model within the context: one token a row, no mask.

    This changes the model's configuration meanwhile, so no other thread may use the model.
    """
    config = unwrapped(model).config.get_text_config()
    with _LOCK:
        usual = config._attn_implementation
        config._attn_implementation = _NAME
        try:
            yield
        finally:
            config._attn_implementation = usual


def shares_prompts(
    model: PreTrainedModel,
    cache: DynamicCache,
    prompt_lengths: Sequence[int],
    counts: Sequence[int],
) -> bool:
    """Return whether sharing prompts is possible and faster; only on a CPU.

    `cache` is that of the prompts, `counts` the number of rows of each. Not measured on GPUs.
    """
    if model.device.type != "cpu" or max(counts) * len(counts) > 2 * sum(counts):
        return False
    if not _can_share(model, cache):
        return False
    keys = cache.layers[0].keys
    saved = sum(length * (n - 1) for length, n in zip(prompt_lengths, counts, strict=True))
    if saved * keys.shape[1] * keys.shape[-1] < _LEAST_SAVED:
        return False
    inner = unwrapped(model)
    if inner not in _AGREED:
        _AGREED[inner] = _agrees(model)
    return _AGREED[inner]


def _can_share(model: PreTrainedModel, cache: DynamicCache) -> bool:
    inner = unwrapped(model)
    return bool(
        getattr(inner, "_supports_attention_backend", False)
        and inner.config.get_text_config()._attn_implementation == "sdpa"
        and {"position_ids", "kwargs"} <= forward_parameters(model)
        and cache_parameter(model) is not None
        and all(isinstance(layer, BlockGrowingLayer) for layer in cache.layers)
    )


@torch.inference_mode()
def _agrees(model: PreTrainedModel) -> bool:
    """Return whether two short rows have equal logits with and without a shared prompt.

    Some models give the attention other keys than those in their cache, or do not pass on its
    arguments; no configuration shows this.
    """
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    prompt = torch.arange(4, device=model.device)[None] % vocabulary
    following = torch.arange(4, 6, device=model.device)[:, None] % vocabulary
    mask, lines = torch.ones_like(prompt), torch.zeros(2, dtype=torch.long, device=model.device)
    expanded, shared = (block_growing_cache(model.config) for _ in range(2))
    try:
        for cache in (expanded, shared):
            _read(model, cache, prompt, torch.arange(4, device=model.device)[None])
        expanded.batch_select_indices(lines)
        prompts = SharedPrompts.of(shared, mask, lines)
        plain = _read(model, expanded, following, torch.full_like(following, 4))
        own = block_growing_cache(model.config)
        with shared_prompt_attention(model):
            together = _read(model, own, following, torch.full_like(following, 4), prompts)
    except Exception:  # the model's own code may raise anything
        return False
    tolerance = 1e-3 if plain.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((together - plain).abs().max() < tolerance * plain.abs().max())


def _read(
    model: PreTrainedModel,
    cache: DynamicCache,
    ids: torch.Tensor,
    position: torch.Tensor,
    prompts: SharedPrompts | None = None,
) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": position, "use_cache": True}
    inputs[str(cache_parameter(model))] = cache
    if prompts is not None:
        inputs["shared_prompts"] = prompts
    return last_logits(model, 1, **inputs)
