"""Facts of a model that forward passes rely on: cache, positions, attention."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """Return the causal language model inside DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the parameter names of the forward pass, of the model inside its wrappers."""
    return _forward_parameters(type(unwrapped(model)))  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _forward_parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def model_config(model: nn.Module) -> Any:
    """Return a model's configuration, also inside a DDP wrapper; None where it has none."""
    return getattr(getattr(model, "module", model), "config", None)


def cache_parameter(model: nn.Module) -> str | None:
    """Return the forward pass's name for its key-value cache; None where it takes none.

    transformers 5.24 renamed `past_key_values` to `cache`.
    """
    known = forward_parameters(model)
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def last_logits(model: nn.Module, keep: int, **inputs: Any) -> torch.Tensor:
    """Compute the logits of the last `keep` positions, (rows, keep, vocabulary).

    Models that can compute only these do so; with others the rest is cut off.
    """
    if "logits_to_keep" in forward_parameters(model):
        inputs["logits_to_keep"] = keep
    return model(**inputs).logits[:, -keep:]


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Convert logits to float32; float64 logits are returned unchanged."""
    return logits if logits.dtype == torch.float64 else logits.float()


_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def supports_cached_prompt(model: nn.Module) -> bool:
    """Return whether several completions can use one prompt's keys and values, with gradient.

    They cannot with recurrent or convolutional layers (whose states are not separate by row), with
    gradient checkpointing (which turns the cache off), or with virtual tokens (which shift every
    column).
    """
    if not takes_positions(model) or cache_parameter(model) is None:
        return False
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    return all(kind in _ATTENTION for kind in layer_types_of(model))


def takes_positions(model: nn.Module) -> bool:
    """Return whether the forward pass takes position ids, and no virtual tokens shift them."""
    learned = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    has_config = model_config(model) is not None
    return has_config and not learned and "position_ids" in forward_parameters(model)


def layer_types_of(model: nn.Module) -> Sequence[str]:
    """Return the kinds of the model's layers; empty where its configuration does not list them."""
    return getattr(model_config(model).get_text_config(), "layer_types", None) or ()
