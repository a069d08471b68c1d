"""Log-probabilities of completions under a model, summed over tokens, differentiable.

A completion's log-probability counts exactly the tokens that were drawn: with the end token where
it was drawn, without one where the completion was cut off.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from bonbon.batching import PaddedRows, Tokens, pad, positions


def last_logits(model: nn.Module, keep: int, **inputs: Any) -> torch.Tensor:
    """The logits of the last `keep` positions, (rows, keep, vocabulary).

    Models that can compute only these do so; of the others the rest is cut off.
    """
    if "logits_to_keep" in forward_parameters(model):
        inputs["logits_to_keep"] = keep
    return model(**inputs).logits[:, -keep:]


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The parameter names of the forward pass, seen through DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return _forward_parameters(type(inner))  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _forward_parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, or as they are where they have float64 already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_log_probs(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """ln p of `ids` (rows, length) under `logits` (rows, length, vocabulary) / temperature.

    In float32, or float64 for float64 logits.
    """
    scores = full_precision(logits)
    if temperature != 1:  # or all logits would be copied for nothing
        scores = scores / temperature
    return scores.gather(-1, ids[..., None]).squeeze(-1) - scores.logsumexp(dim=-1)


def completion_log_probs(
    model: nn.Module, rows: PaddedRows, temperature: float = 1.0
) -> torch.Tensor:
    """Σ_t ln π(y_t | x, y_<t) of each row's completion, shape (rows,), nats."""
    width = rows.completion_mask.shape[1]
    logits = last_logits(
        model,
        width + 1,
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        position_ids=rows.position_ids,
        use_cache=False,
    )
    log_probs = token_log_probs(logits[:, :-1], rows.completion_ids, temperature)
    return (log_probs * rows.completion_mask).sum(dim=-1)


@dataclass(frozen=True)
class SharedPromptRows:
    """One row per prompt with its m completions behind it: the prompt's forward pass is done once.

    Columns are the prompt (P, padded on the left) and m segments of C columns each (padded on the
    right). `input_ids`, `mask`, `position_ids`: (B, P + m·C), where each completion's positions go
    on from the prompt's.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    completions: int
    width: int

    def attention_bias(self, dtype: torch.dtype) -> torch.Tensor:
        """The additive mask, (B, 1, L, L): causal, and no completion sees another one."""
        device, length = self.mask.device, self.mask.shape[1]
        prompt = length - self.completions * self.width
        column = torch.arange(length, device=device)
        # The prompt is segment −1, so that every completion may look at it.
        segment = torch.div(column - prompt, self.width, rounding_mode="floor").clamp(min=-1)
        visible = (segment[None, :] == segment[:, None]) | (segment[None, :] == -1)
        visible &= column[None, :] <= column[:, None]
        allowed = visible[None] & (self.mask[:, None, :] > 0)
        allowed |= torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself
        bias = torch.zeros(allowed.shape, dtype=dtype, device=device)
        return bias.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def shared_prompt_rows(
    prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]], pad_id: int
) -> SharedPromptRows:
    """Lay out each prompt with its completions; `completions[j]` are every prompt's j-th ones."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left")
    flat, flat_mask = pad([row for segment in completions for row in segment], pad_id, "right")
    segments = flat.view(len(completions), len(prompts), -1)
    masks = flat_mask.view(len(completions), len(prompts), -1)
    behind = prompt_mask.sum(dim=1, keepdim=True)
    offsets = behind + torch.arange(segments.shape[2])
    return SharedPromptRows(
        input_ids=torch.cat([prompt_ids, *segments], dim=1),
        mask=torch.cat([prompt_mask, *masks], dim=1),
        position_ids=torch.cat([positions(prompt_mask), *[offsets] * len(completions)], dim=1),
        completions=len(completions),
        width=segments.shape[2],
    )


def shared_prompt_log_probs(
    model: nn.Module, rows: SharedPromptRows, dtype: torch.dtype, temperature: float = 1.0
) -> torch.Tensor:
    """The completions' summed log-probabilities, shape (completions, prompts), nats.

    The same numbers as `completion_log_probs`. `dtype` is the model's.
    """
    m, width = rows.completions, rows.width
    logits = last_logits(
        model,
        m * width + 1,
        input_ids=rows.input_ids,
        attention_mask=rows.attention_bias(dtype),
        position_ids=rows.position_ids,
        use_cache=False,
    )
    sums = []
    for j in range(m):
        start = 1 + j * width
        # The prompt's last column predicts the first token of every completion.
        before = torch.cat([logits[:, :1], logits[:, start : start + width - 1]], dim=1)
        columns = slice(rows.input_ids.shape[1] - (m - j) * width, None)
        ids, mask = rows.input_ids[:, columns][:, :width], rows.mask[:, columns][:, :width]
        sums.append((token_log_probs(before, ids, temperature) * mask).sum(dim=-1))
    return torch.stack(sums)


def supports_shared_prompt(model: nn.Module) -> bool:
    """Whether a model takes a mask of its own with positions to match.

    It must have position ids, plain (eager or sdpa) attention, no local attention or sliding
    window, no ALiBi and no virtual tokens.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    if config is None or "position_ids" not in forward_parameters(model):
        return False
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False  # virtual tokens shift every column
    config = config.get_text_config()
    if getattr(config, "alibi", False) or "local" in getattr(config, "attention_layers", []):
        return False
    layers = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) if not layers else None
    return (
        getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        and all(kind == "full_attention" for kind in layers)
        and window is None
    )
