"""Log-probabilities of whole groups, where completions share their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache

from bonbon.models.forward import (
    cache_parameter,
    last_logits,
    layer_types_of,
    model_config,
    supports_cached_prompt,
    takes_positions,
)
from bonbon.models.logprobs import completion_log_probs, last_log_probs
from bonbon.models.padding import PaddedRows, Tokens, pad, positions


@dataclass(frozen=True)
class GroupRows:
    """G prompts with m completions each.

    `prompt_ids`, `prompt_mask`: (G, P), padded on the left; `completion_ids`, `completion_mask`:
    (G, m, C), padded on the right.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor


def group_rows(
    prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]], pad_id: int
) -> GroupRows:
    """Lay out prompts with their completions; `completions[g]` are the m of the g-th prompt."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left")
    ids, mask = pad([row for group in completions for row in group], pad_id, "right")
    shape = (len(prompts), -1, ids.shape[1])
    return GroupRows(prompt_ids, prompt_mask, ids.view(shape), mask.view(shape))


def group_log_probs(
    model: nn.Module, rows: GroupRows, temperature: float = 1.0, share_prompt: bool = False
) -> torch.Tensor:
    """Compute every completion's summed log-probability, (G, m), nats, with gradient.

    With `share_prompt` each prompt is computed once for its m completions: in one packed row where
    the model supports that, else by a cache of its keys and values. Without it the prompt is
    computed for each completion.
    """
    if not share_prompt:
        return completion_log_probs(model, _own_prompts(rows), temperature).view(
            rows.completion_ids.shape[:2]
        )
    layout = _packed_log_probs if supports_packed_rows(model) else _cached_log_probs
    log_probs = layout(model, rows, temperature).view(rows.completion_ids.shape)
    return (log_probs * rows.completion_mask).sum(dim=-1)


def _own_prompts(rows: GroupRows) -> PaddedRows:
    """Lay out one row for each completion, with its prompt: G·m rows."""
    m = rows.completion_ids.shape[1]
    completion_mask = rows.completion_mask.flatten(0, 1)
    mask = torch.cat([rows.prompt_mask.repeat_interleave(m, dim=0), completion_mask], dim=1)
    ids = [rows.prompt_ids.repeat_interleave(m, dim=0), rows.completion_ids.flatten(0, 1)]
    return PaddedRows(torch.cat(ids, dim=1), mask, positions(mask), completion_mask)


@dataclass(frozen=True)
class _SharedRows:
    """The columns that all completions of a group share, and each completion's own columns.

    A prompt's last token predicts a completion's first one, so it is read with each completion.
    `prompt_*` (G, P - 1) are the prompt's other tokens. `own_*` (G, m, C) are its last token and
    the completion without its last token: these C columns predict the completion's C tokens.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    prompt_positions: torch.Tensor
    own_ids: torch.Tensor
    own_mask: torch.Tensor
    own_positions: torch.Tensor


def _shared_rows(rows: GroupRows) -> _SharedRows:
    m = rows.completion_ids.shape[1]

    def own(prompt: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        return torch.cat([prompt[:, None, -1:].expand(-1, m, 1), completions[..., :-1]], dim=2)

    prompt_mask, own_mask = rows.prompt_mask[:, :-1], own(rows.prompt_mask, rows.completion_mask)
    return _SharedRows(
        prompt_ids=rows.prompt_ids[:, :-1],
        prompt_mask=prompt_mask,
        prompt_positions=positions(prompt_mask),
        own_ids=own(rows.prompt_ids, rows.completion_ids),
        own_mask=own_mask,
        own_positions=prompt_mask.sum(dim=1)[:, None, None] + own_mask.cumsum(dim=2) - 1,
    )


def _cached_log_probs(model: nn.Module, rows: GroupRows, temperature: float) -> torch.Tensor:
    """Compute ln p of every completion's tokens from cached prompts, (G·m, C), nats."""
    shared, m = _shared_rows(rows), rows.completion_ids.shape[1]
    mask = [shared.prompt_mask.repeat_interleave(m, dim=0), shared.own_mask.flatten(0, 1)]

    def inputs() -> dict[str, Any]:
        return {
            "input_ids": shared.own_ids.flatten(0, 1),
            "attention_mask": torch.cat(mask, dim=1),
            "position_ids": shared.own_positions.flatten(0, 1),
        } | _prompt_cache(model, shared, m)

    return last_log_probs(model, rows.completion_ids.flatten(0, 1), temperature, inputs)


def _prompt_cache(model: nn.Module, shared: _SharedRows, m: int) -> dict[str, Any]:
    """Compute the prompts' keys and values, each m times, as arguments of the forward pass."""
    # transformers' own cache, because it appends by concatenation, which has a gradient.
    cache = DynamicCache(config=model_config(model))
    with_cache = {str(cache_parameter(model)): cache, "use_cache": True}
    if shared.prompt_ids.shape[1]:
        last_logits(
            model,
            1,
            input_ids=shared.prompt_ids,
            attention_mask=shared.prompt_mask,
            position_ids=shared.prompt_positions,
            **with_cache,
        )
        cache.batch_repeat_interleave(m)
    return with_cache


def supports_shared_prompt(model: nn.Module) -> bool:
    """Return whether a prompt can be computed once for several completions, with gradient."""
    return supports_packed_rows(model) or supports_cached_prompt(model)


def _packed_log_probs(model: nn.Module, rows: GroupRows, temperature: float) -> torch.Tensor:
    """Compute ln p of every completion's tokens in packed rows, (G, m·C), nats."""
    shared = _shared_rows(rows)
    inputs = {
        "input_ids": torch.cat([shared.prompt_ids, shared.own_ids.flatten(1)], dim=1),
        "attention_mask": _block_mask(shared),
        "position_ids": torch.cat(
            [shared.prompt_positions, shared.own_positions.flatten(1)], dim=1
        ),
        "use_cache": False,
    }
    return last_log_probs(model, rows.completion_ids.flatten(1), temperature, lambda: inputs)


def _block_mask(shared: _SharedRows) -> BlockMask:
    """Build a causal mask in which a completion sees the prompt and itself, no other completion.

    Padding sees only itself.
    """
    prompt, width = shared.prompt_ids.shape[1], shared.own_ids.shape[2]
    real = torch.cat([shared.prompt_mask, shared.own_mask.flatten(1)], dim=1).bool()
    groups, length = real.shape
    column = torch.arange(length, device=real.device)
    # The prompt is segment -1.
    segment = torch.div(column - prompt, width, rounding_mode="floor").clamp(min=-1)

    def visible(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        near = (segment[key] == segment[query]) | (segment[key] < 0)
        return (near & (key <= query) & real[row, key]) | (key == query)

    return create_block_mask(visible, groups, None, length, length, device=str(real.device))


def supports_packed_rows(model: nn.Module) -> bool:
    """Return whether a model takes a block-sparse mask, with gradient: flex attention on a GPU.

    PyTorch has no backward pass for it on a CPU. Layers with sliding windows would use the mask
    instead of their own, so there must be none.
    """
    config = model_config(model)
    if not takes_positions(model) or next(model.parameters()).device.type != "cuda":
        return False
    text = config.get_text_config()
    if getattr(text, "_attn_implementation", None) != "flex_attention":
        return False
    layers = layer_types_of(model)
    if not layers:
        return not getattr(text, "sliding_window", None)
    return all(kind == "full_attention" for kind in layers)


def sharing_pays(rows: GroupRows) -> bool:
    """Return whether computing the prompt once is faster: where it saves a quarter of the tokens.

    `benchmarks/training_step.py` measured this limit; about from there on less memory is taken too.
    Below it the second, short forward pass costs more than is saved.
    """
    _, m, width = rows.completion_ids.shape
    prompt = rows.prompt_ids.shape[1]
    return 4 * (m - 1) * prompt >= m * (prompt + width)
