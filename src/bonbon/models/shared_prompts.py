"""Attention of the rows of a prompt to one copy of its keys and values.

While n completions of a prompt are drawn, attention is bound by memory: every row reads the keys
and values of its prompt and of what it has drawn. Here the rows of a prompt ask its keys and values
together, in one matrix product, and their own by themselves; the two softmaxes are joined by their
normalisers. (Juravsky et al., *Hydragen: High-Throughput LLM Inference with Shared Prefixes*, 2024,
arXiv 2402.05099.)
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
_LOCK = threading.RLock()  # the name of a model's attention stands in its configuration
_AGREED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Keys of a layer that no longer have to be read at each token, from which on sharing is faster.
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
        """From the cache of prompts that were read, under the mask (G, P) of their tokens."""
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        bias = None
        if not bool(mask.all()):
            bias = layers[0][0].new_zeros(mask.shape).masked_fill(mask == 0, -torch.inf)
            bias = bias[:, None, None]
        return cls(layers, bias, prompt_of, *_slots(prompt_of, len(mask)))

    def keep(self, rows: torch.Tensor) -> SharedPrompts:
        """With these rows, some perhaps more than once; prompts that are left without are freed."""
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
        """`_attend` of each row's queries, (rows, heads, g, width), to the row's prompt."""
        prompts, most = self.slots.shape
        keys, values = self.layers[layer]
        together = query[self.slots.flatten()].view(prompts, most, *query.shape[1:])
        together = together.transpose(1, 2).flatten(2, 3)  # (G, heads, m·g, width)
        attended = _attend(together, keys, values, scaling, self.bias)
        apart = (x.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1) for x in attended)
        out, normaliser = (x[self.slot_of] for x in apart)
        return out, normaliser


def _slots(prompt_of: torch.Tensor, prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`slots` and `slot_of` of `SharedPrompts`."""
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
    """Attention of (B, heads, q, width), and the ln of the softmax's denominator, (B, heads, q, 1).

    In float32, or float64 for float64 queries.
    """
    scores = full_precision((query * scaling) @ keys.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1)
    # The largest weight is exp(its score - normaliser): half the time of a logsumexp.
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
    """Attention of one token a row to its prompt and to what the row has drawn.

    `query`: (rows, heads, 1, width); `key`, `value`: (rows, key heads, S, width), without prompts.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])  # queries of each key head
    own, own_normaliser = _attend(grouped, key, value, scale)
    prompt, prompt_normaliser = shared_prompts.attend(module.layer_idx, grouped, scale)
    share = (prompt_normaliser - own_normaliser).sigmoid()
    out = torch.lerp(own, prompt, share.to(own.dtype))
    return out.reshape(len(query), 1, -1, value.shape[-1]), None


# Without a mask function of the same name: transformers makes no mask for it.
AttentionInterface.register(_NAME, _attention)


@contextmanager
def shared_prompt_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model's attention is the one above: one token a row, no mask.

    The model's configuration says so meanwhile, so no other thread may use the model.
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
    """Whether rows should share their prompts: a model that can, on a CPU, and enough to share.

    `cache` is that of the prompts, `counts` the rows of each. On a GPU it has not been measured.
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
    """Whether two rows come out the same with their prompt shared and without, on a few tokens.

    Some models give the attention other keys than their cache holds, or do not pass on what it
    needs; nothing in a configuration tells.
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
    except Exception:  # a model's own code, of which nothing is known
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
