"""Log-probabilities of completions under a model, summed over tokens, differentiable.

A completion's log-probability counts exactly the tokens that were drawn: with the end token where
it was drawn, without one where the completion was cut off.

A group's completions share their prompt. Three layouts give the same numbers and gradients:

- one row a completion, each with a prompt of its own: the reference, which every model takes;
- the prompt first, whose keys and values, gradient included, then serve one row a completion;
- one row a group, prompt and completions one behind the other under a block-sparse mask.

The logits of a large batch are never all held: its hidden states go through the output head chunk
by chunk, and backward computes each chunk's logits anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from bonbon.batching import PaddedRows, Tokens, pad, positions
from bonbon.models import devices_of

# Up to this many logits (rows x positions x vocabulary) are computed at once, 64 MiB in float32;
# more go in chunks of as many, or on a CPU of fewer, which is as fast and holds less.
_LOGITS = 2**24
_CPU_LOGITS = 2**22

Inputs = Callable[[], dict[str, Any]]

# --- what a model is and takes --------------------------------------------------------------------


def unwrapped(model: nn.Module) -> Any:
    """The causal language model inside DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The parameter names of the forward pass, seen through DDP and PEFT wrappers."""
    return _forward_parameters(type(unwrapped(model)))  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _forward_parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def model_config(model: nn.Module) -> Any:
    """A model's configuration, seen through a DDP wrapper; None where it has none."""
    return getattr(getattr(model, "module", model), "config", None)


def cache_parameter(model: nn.Module) -> str | None:
    """What the forward pass calls its key-value cache; None where it takes none.

    transformers 5.24 renamed `past_key_values` to `cache`.
    """
    known = forward_parameters(model)
    return next((name for name in ("cache", "past_key_values") if name in known), None)


# --- log-probabilities of tokens ------------------------------------------------------------------


def last_logits(model: nn.Module, keep: int, **inputs: Any) -> torch.Tensor:
    """The logits of the last `keep` positions, (rows, keep, vocabulary).

    Models that can compute only these do so; of the others the rest is cut off.
    """
    if "logits_to_keep" in forward_parameters(model):
        inputs["logits_to_keep"] = keep
    return model(**inputs).logits[:, -keep:]


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, or as they are where they have float64 already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_log_probs(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """ln p of `ids` (..., length) under `logits` (..., length, vocabulary) / temperature.

    In float32, or float64 for float64 logits.
    """
    scores = full_precision(logits)
    if temperature != 1:  # or all logits would be copied for nothing
        scores = scores / temperature
    # Faster than a gather and a logsumexp, and holds less for backward.
    losses = F.cross_entropy(scores.flatten(0, -2), ids.flatten(), reduction="none")
    return -losses.view(ids.shape)


def last_log_probs(
    model: nn.Module, targets: torch.Tensor, temperature: float, inputs: Inputs
) -> torch.Tensor:
    """ln p of `targets`, (rows, length): the tokens that the last `length` positions predict.

    `inputs` makes the forward pass's arguments: once for each pass, as a cache serves but one.
    """
    config = model_config(model)
    if config is not None and targets.numel() * config.get_text_config().vocab_size > _LOGITS:
        log_probs = _chunked_log_probs(model, targets, temperature, inputs)
        if log_probs is not None:
            return log_probs
    return token_log_probs(last_logits(model, targets.shape[1], **inputs()), targets, temperature)


def _chunked_log_probs(
    model: nn.Module, targets: torch.Tensor, temperature: float, inputs: Inputs
) -> torch.Tensor | None:
    """`last_log_probs` in chunks; None where the model's logits are not its head's own output.

    For one call the head puts out log-probabilities instead. It does so inside the model's forward
    pass, so that whatever is wrapped around the model (DDP, FSDP, PEFT, autocast) does its part.
    """
    inner = unwrapped(model)
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    # DataParallel would copy the changed head to other devices, bound to the first one's weights.
    if head is None or isinstance(model, nn.DataParallel) or _scales_logits(model):
        return None
    if len(devices_of(inner)) > 1:  # its logits are moved to where the inputs are
        return None
    length, project = targets.shape[1], head.forward
    limit = _CPU_LOGITS if targets.device.type == "cpu" else _LOGITS
    chunk = limit // model_config(model).get_text_config().vocab_size
    put_out: list[torch.Tensor] = []
    returned: list[torch.Tensor] = []

    def log_probs_instead(hidden: torch.Tensor) -> torch.Tensor:
        log_probs = _by_chunks(project, hidden[:, -length:], targets, temperature, chunk)
        put_out.append(log_probs[..., None])
        return put_out[-1]

    given = inputs()  # which may take a pass with the head as it is
    watch = inner.register_forward_hook(lambda *seen: returned.append(seen[-1].logits))
    try:
        with _forward_replaced(head, log_probs_instead):
            log_probs = last_logits(model, length, **given).squeeze(-1)
    finally:
        watch.remove()
    once = len(put_out) == len(returned) == 1
    # The same tensor, not written to since: nothing was done to the head's output.
    return log_probs if once and put_out[0] is returned[0] and put_out[0]._version == 0 else None


def _by_chunks(
    project: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    chunk: int,
) -> torch.Tensor:
    """ln p of `targets` (rows, length) from `hidden` (rows, length, width), `chunk` at a time."""

    def log_probs(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return token_log_probs(project(states), ids, temperature)

    states, ids = hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk)
    parts = zip(states, ids, strict=True)
    done = [checkpoint(log_probs, *part, use_reentrant=False) for part in parts]
    return torch.cat(done).view(targets.shape)


def _scales_logits(model: nn.Module) -> bool:
    """Whether the configuration names something that is done to the head's output.

    Only saves the forward pass in which that would be noticed.
    """
    settings = vars(model_config(model).get_text_config()).items()
    done = [
        value for name, value in settings if "logit" in name and ("scal" in name or "cap" in name)
    ]
    return any(value not in (None, 1) for value in done)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate's hooks may have set one
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def completion_log_probs(
    model: nn.Module, rows: PaddedRows, temperature: float = 1.0
) -> torch.Tensor:
    """Σ_t ln π(y_t | x, y_<t) of each row's completion, shape (rows,), nats."""
    inputs = {  # The last column predicts nothing.
        "input_ids": rows.input_ids[:, :-1],
        "attention_mask": rows.attention_mask[:, :-1],
        "position_ids": rows.position_ids[:, :-1],
        "use_cache": False,
    }
    log_probs = last_log_probs(model, rows.completion_ids, temperature, lambda: inputs)
    return (log_probs * rows.completion_mask).sum(dim=-1)


# --- groups of completions ------------------------------------------------------------------------


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
    """Lay out prompts with their completions; `completions[g]` are the g-th prompt's, m of them."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left")
    ids, mask = pad([row for group in completions for row in group], pad_id, "right")
    shape = (len(prompts), -1, ids.shape[1])
    return GroupRows(prompt_ids, prompt_mask, ids.view(shape), mask.view(shape))


def group_log_probs(
    model: nn.Module, rows: GroupRows, temperature: float = 1.0, share_prompt: bool = False
) -> torch.Tensor:
    """Every completion's summed log-probability, (G, m), nats, with gradient.

    With `share_prompt` each prompt is computed once, whatever m: in one packed row where the model
    supports it, else by its keys and values. Without, every completion has a prompt of its own.
    """
    if not share_prompt:
        return completion_log_probs(model, _own_prompts(rows), temperature).view(
            rows.completion_ids.shape[:2]
        )
    way = _packed_log_probs if supports_packed_rows(model) else _cached_log_probs
    log_probs = way(model, rows, temperature).view(rows.completion_ids.shape)
    return (log_probs * rows.completion_mask).sum(dim=-1)


def _own_prompts(rows: GroupRows) -> PaddedRows:
    """One row a completion, G·m rows, each with a prompt of its own."""
    m = rows.completion_ids.shape[1]
    completion_mask = rows.completion_mask.flatten(0, 1)
    mask = torch.cat([rows.prompt_mask.repeat_interleave(m, dim=0), completion_mask], dim=1)
    ids = [rows.prompt_ids.repeat_interleave(m, dim=0), rows.completion_ids.flatten(0, 1)]
    return PaddedRows(torch.cat(ids, dim=1), mask, positions(mask), completion_mask)


@dataclass(frozen=True)
class _SharedRows:
    """What all completions of a group share, and what each has to itself.

    A prompt's last token is read once a completion, since it predicts the completion's first one:
    `prompt_*` (G, P - 1) are the other tokens, `own_*` (G, m, C) that token and the completion but
    its last token, so that the C columns predict the completion's C tokens.
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


# --- the prompt's keys and values -----------------------------------------------------------------


def _cached_log_probs(model: nn.Module, rows: GroupRows, temperature: float) -> torch.Tensor:
    """ln p of every completion's tokens, (G·m, C)."""
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
    """The prompts' keys and values, each m times, as the forward pass takes them."""
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
    """Whether a prompt can be computed once for several completions, with gradient."""
    return supports_packed_rows(model) or supports_cached_prompt(model)


_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def supports_cached_prompt(model: nn.Module) -> bool:
    """Whether a prompt's keys and values can serve several completions, with gradient.

    Not with recurrent or convolutional layers (their states are not kept apart by rows), gradient
    checkpointing (it turns the cache off) or virtual tokens (they shift every column).
    """
    if not _takes_positions(model) or cache_parameter(model) is None:
        return False
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    return all(kind in _ATTENTION for kind in _layer_types(model))


# --- packed rows ----------------------------------------------------------------------------------


def _packed_log_probs(model: nn.Module, rows: GroupRows, temperature: float) -> torch.Tensor:
    """ln p of every completion's tokens, (G, m·C)."""
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
    """Causal, and a completion sees the prompt and itself; padding sees itself alone."""
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
    """Whether a model takes a block-sparse mask, with gradient: flex attention on a GPU.

    PyTorch has no backward pass of it on a CPU. Layers with windows would take the mask for
    theirs, so there must be none.
    """
    config = model_config(model)
    if not _takes_positions(model) or next(model.parameters()).device.type != "cuda":
        return False
    text = config.get_text_config()
    if getattr(text, "_attn_implementation", None) != "flex_attention":
        return False
    layers = _layer_types(model)
    if not layers:
        return not getattr(text, "sliding_window", None)
    return all(kind == "full_attention" for kind in layers)


def _takes_positions(model: nn.Module) -> bool:
    """Whether a column's position can be given, and is not shifted by virtual tokens."""
    learned = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    has_config = model_config(model) is not None
    return has_config and not learned and "position_ids" in forward_parameters(model)


def _layer_types(model: nn.Module) -> Sequence[str]:
    return getattr(model_config(model).get_text_config(), "layer_types", None) or ()
