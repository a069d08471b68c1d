"""Log-probabilities of completions under a model, summed over tokens, differentiable.

A completion's log-probability counts exactly the tokens that were drawn: the end token is among
them if it was drawn, and not if the completion was cut off.

The completions of a group share their prompt. Three layouts give the same numbers and gradients:

- one row for each completion, with its prompt: the reference, which every model takes;
- the prompt once, whose keys and values, with gradient, are then used by one row a completion;
- one row for each group, the prompt followed by all completions, under a block-sparse mask.

The logits of a large batch are never in memory all at once: its hidden states go through the output
head in chunks, and the backward pass recomputes each chunk's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bonbon.models.forward import full_precision, last_logits, model_config, unwrapped
from bonbon.models.loading import devices_of
from bonbon.models.padding import PaddedRows

# Up to this many logits (rows x positions x vocabulary) are computed at once, 64 MiB in float32;
# more are computed in chunks of this size, or on a CPU of a smaller one, which is as fast.
_LOGITS = 2**24


_CPU_LOGITS = 2**22


Inputs = Callable[[], dict[str, Any]]


def token_log_probs(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Compute ln p of `ids` (..., length) under `logits` (..., length, vocabulary) / temperature.

    In nats; float32, or float64 for float64 logits.
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
    """Compute ln p of `targets`, (rows, length), the tokens that the last positions predict.

    `inputs` makes the forward pass's arguments, once for each pass, since each needs its own cache.
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
    """Compute `last_log_probs` in chunks; None where the head's output is not the model's logits.

    For one call the head returns log-probabilities instead of logits. This happens inside the
    model's forward pass, so that all wrappers of the model (DDP, FSDP, PEFT, autocast) take part.
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
    # The same tensor, not written to since: the head's output is the model's.
    return log_probs if once and put_out[0] is returned[0] and put_out[0]._version == 0 else None


def _by_chunks(
    project: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    chunk: int,
) -> torch.Tensor:
    """Compute ln p of `targets` (rows, length) from `hidden` (rows, length, width) in chunks."""

    def log_probs(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return token_log_probs(project(states), ids, temperature)

    states, ids = hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk)
    parts = zip(states, ids, strict=True)
    done = [checkpoint(log_probs, *part, use_reentrant=False) for part in parts]
    return torch.cat(done).view(targets.shape)


def _scales_logits(model: nn.Module) -> bool:
    """Return whether the configuration has a scale or a cap of the head's output.

    `_chunked_log_probs` would notice such an operation too, but only after a forward pass.
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
    """Compute Σ_t ln π(y_t | x, y_<t) of each row's completion, shape (rows,), nats."""
    inputs = {  # The last column predicts nothing.
        "input_ids": rows.input_ids[:, :-1],
        "attention_mask": rows.attention_mask[:, :-1],
        "position_ids": rows.position_ids[:, :-1],
        "use_cache": False,
    }
    log_probs = last_log_probs(model, rows.completion_ids, temperature, lambda: inputs)
    return (log_probs * rows.completion_mask).sum(dim=-1)
